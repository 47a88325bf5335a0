"""How far hidden states have moved, against numbers worked out by hand."""

from __future__ import annotations

import pytest
import torch

from vllm_d2cache.ops.hidden_change import at_most_one, relative_change


def test_change_is_relative_to_the_old_state() -> None:
    old = torch.tensor([[3.0, 4.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
    new = torch.tensor([[3.0, 4.0, 1.0, 1.0], [1.0, 1.0, 1.0, -3.0]])
    # Mean distances 0.5 and 1; root mean squares 5 / 2 and 1.
    torch.testing.assert_close(relative_change(new, old), torch.tensor([0.2, 1.0]))


def test_a_state_of_zeros_is_not_divided_by() -> None:
    got = relative_change(torch.ones(1, 4, dtype=torch.bfloat16), torch.zeros(1, 4, dtype=torch.bfloat16))
    assert got.dtype == torch.float32
    assert float(got) == pytest.approx(1e6)


def test_each_request_is_scaled_by_its_own_largest() -> None:
    change = torch.tensor([0.5, 0.25, 4.0, 1.0, 0.0])
    request = torch.tensor([0, 0, 2, 2, 3])
    assert at_most_one(change, request, 4).tolist() == [0.5, 0.25, 1.0, 0.25, 0.0]
