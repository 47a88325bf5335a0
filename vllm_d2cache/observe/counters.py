"""What steps cost, counted where they happen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vllm_d2cache.canvas.rows import StepRows
from vllm_d2cache.mechanisms.base import Hook


@dataclass
class StepCounters:
    """Sums over all steps since the last reset. Counting waits for nothing: what the device knows is summed there.

    Attributes:
        forwards: forward passes of the engine, whatever the size of the batch.
        steps: steps of requests: a forward pass counts once for each request in it.
        keys: positions whose cached K and V a step's rows attended to.
    """

    forwards: int = 0
    steps: int = 0
    keys: int = 0
    _sums: torch.Tensor | None = None  # [3] int64: rows, predicted, committed

    @property
    def rows(self) -> int:
        """Rows that went through the network: positions recomputed, and rows behind the text."""
        return self._sum(0)

    @property
    def predicted(self) -> int:
        """Rows whose logits were computed; no padding here either."""
        return self._sum(1)

    @property
    def committed(self) -> int:
        """Masks turned into tokens."""
        return self._sum(2)

    def _sum(self, index: int) -> int:
        return 0 if self._sums is None else int(self._sums[index])

    def add(self, rows: StepRows, hooks: Sequence[Hook], committed: torch.Tensor) -> None:
        """Count one forward pass.

        Args:
            hooks: of the step, which know what its rows attended to.
            committed: [R, G] bool.
        """
        self.forwards += 1
        self.steps += len(rows.slots)
        for r, length in enumerate(rows.lengths):
            seen = [keys for hook in hooks if (keys := hook.keys_attended(r)) is not None]
            self.keys += min(seen, default=length)
        refreshed = rows.refreshed.sum() + sum(rows.extra)
        predicted = rows.predicted.sum() + len(rows.logits_rows) - len(rows.predicted_index[0])
        now = torch.stack([refreshed, predicted, committed.sum()])
        self._sums = now if self._sums is None else self._sums + now

    def reset(self) -> None:
        """Start again from zero."""
        self.forwards = self.steps = self.keys = 0
        self._sums = None
