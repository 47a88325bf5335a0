"""From the host to the device without waiting for it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import torch

_NUMPY: dict[torch.dtype, Any] = {
    torch.bool: np.bool_,
    torch.int32: np.int32,
    torch.int64: np.int64,
    torch.float32: np.float32,
    torch.float64: np.float64,
}


def upload(values: Sequence[Any] | np.ndarray, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """The numbers, or lists of them, as a tensor; on CUDA through pinned memory, or the copy would block."""
    if device.type == "cpu":
        return torch.from_numpy(np.array(values, dtype=_NUMPY[dtype]))
    host = torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda")
    return host.to(device, non_blocking=True)


def upload_lists(lists: Sequence[Sequence[int]], dtype: torch.dtype, device: torch.device) -> list[torch.Tensor]:
    """Each list as a tensor; all of them go there in one copy."""
    together = upload([x for values in lists for x in values], dtype, device)
    return list(together.split([len(values) for values in lists]))


def upload_arrays(arrays: Sequence[np.ndarray], device: torch.device) -> list[torch.Tensor]:
    """Each array as a tensor of its own type and shape; all of them go there in one copy."""
    if device.type == "cpu":
        return [torch.from_numpy(np.array(array)) for array in arrays]
    # Every part begins at a multiple of 16 bytes: a part of wider numbers could not begin anywhere.
    ends = list(accumulate(-(-array.nbytes // 16) * 16 for array in arrays))
    memory, starts = np.zeros(ends[-1] if ends else 0, dtype=np.uint8), [0, *ends]
    for start, array in zip(starts, arrays, strict=False):
        memory[start : start + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    host = torch.tensor(memory, pin_memory=device.type == "cuda")
    there = host.to(device, non_blocking=True)
    types = {numpy_type: dtype for dtype, numpy_type in _NUMPY.items()}
    return [
        there[start : start + array.nbytes].view(types[array.dtype.type]).view(array.shape)
        for start, array in zip(starts, arrays, strict=False)
    ]


class Writes:
    """Numbers for lines of several tables of a device, collected on the host and sent there in one copy."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._targets: list[torch.Tensor] = []
        self._arrays: list[np.ndarray] = []

    def put(self, target: torch.Tensor, values: Any) -> None:
        """Have ``values``, numbers on the host, written into ``target``, a part of a table of their shape."""
        with np.errstate(over="ignore"):  # what float32 cannot hold is infinite
            array = np.asarray(values, dtype=_NUMPY[target.dtype])
        assert array.shape == target.shape
        self._targets.append(target)
        self._arrays.append(array)

    def send(self) -> None:
        """Write all of it."""
        if not self._targets:
            return
        for target, values in zip(self._targets, upload_arrays(self._arrays, self.device), strict=True):
            target.copy_(values)
        self._targets, self._arrays = [], []


class Numbers:
    """Short lists of the host that kernels of a step read on the device.

    Those that are expected when the first one is asked for go there in one copy. The same list goes there once.
    """

    def __init__(self) -> None:
        self._there: dict[tuple[torch.dtype, tuple[int, ...]], torch.Tensor] = {}
        self._expected: dict[tuple[torch.dtype, tuple[int, ...]], None] = {}

    def expect(self, values: Sequence[int], dtype: torch.dtype) -> None:
        """These will be asked for."""
        key = (dtype, tuple(values))
        if key not in self._there:
            self._expected[key] = None

    def on(self, device: torch.device, values: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """``values`` on the device, one-dimensional."""
        key = (dtype, tuple(values))
        if key not in self._there:
            keys = list(dict.fromkeys([*self._expected, key]))
            arrays = [np.asarray(numbers, dtype=_NUMPY[kind]) for kind, numbers in keys]
            self._there.update(zip(keys, upload_arrays(arrays, device), strict=True))
            self._expected = {}
        return self._there[key]
