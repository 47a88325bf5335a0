"""Tensors of host memory as NumPy sees them, and memory at an address."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch

Array = np.ndarray[Any, np.dtype[Any]]
_TYPES = {torch.bool: "|b1", torch.int32: "<i4", torch.int64: "<i8", torch.uint64: "<u8"}


class _RawMemory:
    """Lets NumPy view `shape` elements of type `typestr` at an address (the kernels' pointer arguments)."""

    def __init__(self, address: int, shape: tuple[int, ...], typestr: str) -> None:
        data = (address, False)
        self.__array_interface__ = {"data": data, "shape": shape, "typestr": typestr, "version": 3}


@lru_cache(maxsize=256)
def _at(address: int, shape: tuple[int, ...], typestr: str) -> Array:
    """A writable view, not a copy. It owns nothing: the same for whatever lies at that address later on."""
    return np.asarray(_RawMemory(address, shape, typestr))


def int32_at(address: int, *shape: int) -> Array:
    """A writable view, not a copy; the caller vouches for the memory as the Triton kernel's caller does."""
    return _at(address, shape, "<i4")


def view(tensor: torch.Tensor) -> Array:
    """The tensor's memory, writable. `Tensor.numpy()` dispatches four operators, and would do so in every step.

    The view lies with the tensor, many of which vLLM makes once, and has no reference to it: they end together.
    """
    kept: Array | None = tensor.__dict__.get("_d2cache_view")
    if kept is None:
        if not (tensor.numel() and tensor.is_contiguous() and tensor.dtype in _TYPES):
            return tensor.numpy()
        kept = _at(tensor.data_ptr(), tuple(tensor.shape), _TYPES[tensor.dtype])
        tensor.__dict__["_d2cache_view"] = kept
    return kept


def flat(tensor: torch.Tensor) -> Array:
    """The elements in memory order; raises for a tensor of which that is no view (writes would be lost)."""
    return view(tensor if tensor.is_contiguous() else tensor.view(-1)).reshape(-1)
