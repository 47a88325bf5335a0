"""Vectors that layers keep for the rows of running requests."""

from __future__ import annotations

import torch


class RowStore:
    """Slot -> [layers, rows, d]."""

    def __init__(self) -> None:
        self._kept: dict[int, torch.Tensor] = {}

    def of(self, slot: int, layers: int, rows: int, like: torch.Tensor) -> torch.Tensor:
        """What is kept of a slot; zeros when its request's first step asks for it. ``like`` is [n, d]."""
        if slot not in self._kept:
            self._kept[slot] = like.new_zeros(layers, rows, like.shape[1])
        return self._kept[slot]

    def drop(self, slot: int) -> None:
        """Forget a request."""
        self._kept.pop(slot, None)
