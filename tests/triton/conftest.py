"""Triton kernels: on a GPU, or on CPU tensors by Triton's interpreter; compiled anywhere (``make kernels``).

What is compiled can also be run on CPU tensors, a warp after the other (tests/triton/ptx).
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HERE = Path(__file__).parent
COMPILES = {HERE / f"test_{name}.py" for name in ("compiles_for_hopper", "ptx", "warm_up", "warps")}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Say what is missing where kernels cannot run; what is marked gpu has real shapes, hours in the interpreter."""
    for item in items:
        if HERE not in item.path.parents:
            continue
        if item.path in COMPILES:
            if INTERPRETED:
                item.add_marker(pytest.mark.skip(reason="TRITON_INTERPRET is set: nothing is compiled"))
        elif not INTERPRETED and not torch.cuda.is_available():
            # Kernels bind to the interpreter or the compiler when they are defined: too late to change it here.
            item.add_marker(pytest.mark.skip(reason="no GPU, and TRITON_INTERPRET is not set (make kernels)"))
        elif INTERPRETED and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="real shapes need a GPU"))


@pytest.fixture(autouse=True)
def poisoned_memory(poison_empty: None) -> None:
    """See tests/conftest.py."""


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where kernels run."""
    return torch.device("cpu" if INTERPRETED else "cuda")
