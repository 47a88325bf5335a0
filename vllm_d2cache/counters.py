"""What steps cost, counted where they happen."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vllm_d2cache.records import StepRows


@dataclass
class StepCounters:
    """Sums over all steps since the last reset. Counting waits for nothing: commits are summed on the device.

    Attributes:
        forwards: forward passes of the engine, whatever the size of the batch.
        steps: steps of requests: a forward pass counts once for each request in it.
        rows: rows that went through the network: positions recomputed, and shadows (ops/shadow_attention.py).
        keys: positions whose cached K and V a step's rows attended to.
        predicted: rows whose logits were computed.
    """

    forwards: int = 0
    steps: int = 0
    rows: int = 0
    keys: int = 0
    predicted: int = 0
    _committed: torch.Tensor | None = None

    @property
    def committed(self) -> int:
        """Masks turned into tokens."""
        return 0 if self._committed is None else int(self._committed)

    def add(self, rows: StepRows, lengths: list[int], committed: torch.Tensor) -> None:
        """Count one forward pass.

        Args:
            lengths: keys that the rows of each request attended to.
            committed: [R, G] bool.
        """
        self.forwards += 1
        self.steps += len(rows.slots)
        self.rows += rows.positions.shape[0]
        self.keys += sum(lengths)
        self.predicted += rows.logits_rows.shape[0]
        now = committed.sum()
        self._committed = now if self._committed is None else self._committed + now

    def reset(self) -> None:
        """Start again from zero."""
        self.forwards = self.steps = self.rows = self.keys = self.predicted = 0
        self._committed = None
