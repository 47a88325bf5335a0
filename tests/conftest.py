"""Fixtures of all tests: fixed seeds, and poison in the memory that the package leaves uninitialised."""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Callable, Iterator
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch

hypothesis.settings.register_profile(
    "default", deadline=None, derandomize=True, database=None, print_blob=True, max_examples=25
)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))

_PACKAGE = "vllm_d2cache"
_POISON_INT = 0x5A5A5A5A


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    """The same random numbers in every run and in any order of tests."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


def poison(tensor: torch.Tensor) -> torch.Tensor:
    """Fill with values that spoil every result they reach: NaN, or a large number."""
    if tensor.is_floating_point():
        return tensor.fill_(float("nan"))
    if tensor.dtype == torch.bool:
        return tensor.fill_(True)
    return tensor.fill_(min(_POISON_INT, torch.iinfo(tensor.dtype).max))


def _poisoned(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def wrapper(*args: Any, **kwargs: Any) -> torch.Tensor:
        out = make(*args, **kwargs)
        caller = sys._getframe(1).f_globals.get("__name__", "")
        return poison(out) if caller.split(".")[0] == _PACKAGE else out

    return wrapper


@pytest.fixture
def poison_empty(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whatever the package allocates without initialising it is full of poison."""
    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, _poisoned(getattr(torch, name)))
    monkeypatch.setattr(torch.Tensor, "new_empty", _poisoned(torch.Tensor.new_empty))
    yield
