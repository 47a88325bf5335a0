"""The backward vector chain against the full matrix product."""

from __future__ import annotations

import pytest
import torch

from tests.reference.rollout import rollout_dense
from vllm_d2cache.ops.rollout import push_back_map, rollout

TOTAL = 37


def random_maps(layers: int, rows: int, total: int) -> list[torch.Tensor]:
    return [torch.softmax(3 * torch.randn(rows, total), -1) for _ in range(layers)]


def chain(maps: list[torch.Tensor], rows: torch.Tensor, total: int) -> torch.Tensor:
    return rollout((push_back_map(m) for m in reversed(maps)), rows, total)


@pytest.mark.parametrize("count", [1, 5, TOTAL - 1, TOTAL])
@pytest.mark.parametrize("layers", [1, 2, 8])
def test_matches_the_matrix_product(layers: int, count: int) -> None:
    rows = torch.randperm(TOTAL)[:count].sort().values
    maps = random_maps(layers, count, TOTAL)
    got = chain(maps, rows, TOTAL)
    torch.testing.assert_close(got.double(), rollout_dense(maps, rows), rtol=2e-6, atol=2e-6)
    assert float(got.sum()) == pytest.approx(TOTAL, rel=1e-5)


def test_order_of_the_layers_matters() -> None:
    rows = torch.arange(TOTAL)
    maps = random_maps(3, TOTAL, TOTAL)
    assert not torch.allclose(chain(maps, rows, TOTAL), chain(maps[::-1], rows, TOTAL), atol=1e-3)


def test_nothing_refreshed_leaves_every_position_its_own() -> None:
    rows = torch.empty(0, dtype=torch.int64)
    assert chain(random_maps(2, 0, TOTAL), rows, TOTAL).tolist() == [1.0] * TOTAL


def test_a_refreshed_position_keeps_little_of_its_own() -> None:
    rows = torch.tensor([4])
    attention = torch.zeros(1, TOTAL)
    attention[0, 9] = 1.0
    got = chain([attention] * 6, rows, TOTAL)
    assert float(got[4]) == 2.0**-6
    assert float(got[9]) == 2.0 - 2.0**-6
