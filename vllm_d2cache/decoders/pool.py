"""Memory by canvas slot for the requests that need it, and for no others."""

from __future__ import annotations

import torch


class CanvasPool:
    """Hands each request a range of lines, one for each of its canvas slots; tensors are laid out by line.

    A decoder that keeps a vector for every canvas slot would otherwise need as many as requests can run times the
    longest text. Ranges are given out first fit; tensors that :meth:`fit` returns grow when the ranges do.

    Args:
        num_slots: requests that can run at a time.
    """

    def __init__(self, num_slots: int, device: torch.device) -> None:
        self._first = torch.zeros(num_slots, dtype=torch.int64, device=device)
        self._ranges: dict[int, tuple[int, int]] = {}  # slot -> first line, end

    @property
    def num_lines(self) -> int:
        """Lines up to the end of the last range."""
        return max((end for _, end in self._ranges.values()), default=0)

    def take(self, slot: int, length: int) -> slice:
        """Give the request in ``slot`` a range of ``length`` lines, in place of one it may have; returns it."""
        self._ranges.pop(slot, None)
        first = 0
        for start, end in sorted(self._ranges.values()):
            if start - first >= length:
                break
            first = end
        self._ranges[slot] = (first, first + length)
        self._first[slot] = first
        return slice(first, first + length)

    def give_back(self, slot: int) -> None:
        """The range of ``slot`` is free again."""
        self._ranges.pop(slot, None)

    def lines(self, slots: torch.Tensor, canvas_slot: torch.Tensor) -> torch.Tensor:
        """[n] int64: the line of each canvas slot [n] of the requests in ``slots`` [n]."""
        return self._first[slots] + canvas_slot

    def fit(self, memory: torch.Tensor) -> torch.Tensor:
        """``memory`` [lines, ...] itself, or a longer copy with zeros behind it where it has too few lines."""
        missing = self.num_lines - memory.shape[0]
        if missing <= 0:
            return memory
        return torch.cat([memory, memory.new_zeros(missing, *memory.shape[1:])])
