"""The poison reaches the package's allocations and nobody else's."""

from __future__ import annotations

import torch

from tests.conftest import poison
from vllm_d2cache.mechanisms.importance import MapPool


def test_memory_the_package_leaves_uninitialised_is_poisoned() -> None:
    assert MapPool().take(0, 15, torch.device("cpu")).isnan().all()


def test_poison_fits_every_kind_of_tensor() -> None:
    assert poison(torch.zeros(2)).isnan().all()
    assert poison(torch.zeros(2, dtype=torch.bool)).all()
    assert (poison(torch.zeros(2, dtype=torch.int8)) == 127).all()
    assert (poison(torch.zeros(2, dtype=torch.int64)) > 1 << 30).all()
