"""Memory that lanes read and write by its addresses."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


class Fault(Exception):
    """Of a program that a GPU would stop, or that it may run in more ways than one."""


class Region(NamedTuple):
    """Bytes that belong together."""

    start: int
    content: NDArray[np.uint8]


class Memory:
    """A few regions; what lies outside is nobody's."""

    def __init__(self, regions: list[Region]) -> None:
        self.regions = regions

    def load(self, address: NDArray[np.int64], kind: np.dtype) -> Array:
        """[n] numbers from [n] addresses."""
        out = np.empty((len(address), kind.itemsize), np.uint8)
        for content, lanes, index in self._places(address, kind.itemsize):
            out[lanes] = content[index]
        return out.view(kind)[:, 0]

    def store(self, address: NDArray[np.int64], values: Array) -> None:
        """[n] numbers to [n] addresses.

        Raises:
            Fault: also where lanes write different numbers to one place.
        """
        values = np.ascontiguousarray(values)
        size = values.dtype.itemsize
        rows = values.view(np.uint8).reshape(-1, size)
        for content, lanes, index in self._places(address, size):
            content[index] = rows[lanes]
            if (content[index] != rows[lanes]).any():
                raise Fault("lanes of a warp write different numbers to one address")

    def _places(
        self, address: NDArray[np.int64], size: int
    ) -> list[tuple[NDArray[np.uint8], slice | NDArray[np.bool_], NDArray[np.int64]]]:
        """Of each region that is meant: its content, the lanes, and which bytes each of them means."""
        if (address % size).any():
            raise Fault(f"addresses are no multiples of {size}")
        found: list[tuple[NDArray[np.uint8], slice | NDArray[np.bool_], NDArray[np.int64]]] = []
        left = np.ones(len(address), bool)
        span = np.arange(size)
        for start, content in self.regions:
            inside = left & (address >= start) & (address + size <= start + len(content))
            if not inside.any():
                continue
            lanes = slice(None) if inside.all() else inside
            found.append((content, lanes, (address[lanes] - start)[:, None] + span))
            left &= ~inside
            if not left.any():
                break
        if left.any():
            raise Fault("out of bounds")
        return found
