"""What steps cost, counted where they happen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from vllm_d2cache.canvas.rows import StepRows
from vllm_d2cache.mechanisms.base import Hook

# Steps whose numbers are kept one by one.
_AT_MOST = 256


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
    # For each step since they were last added up: rows of the text [R] int64, predicted [R], and commits [R].
    _steps: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = field(default_factory=list)
    _sums: torch.Tensor | None = None  # [3] int64, of those before
    _extra: int = 0  # rows behind the text
    _verified: int = 0  # of these, rows with logits

    @property
    def rows(self) -> int:
        """Rows that went through the network: positions recomputed, and rows behind the text."""
        return self._sum(0) + self._extra

    @property
    def predicted(self) -> int:
        """Rows whose logits were computed; no padding here either."""
        return self._sum(1) + self._verified

    @property
    def committed(self) -> int:
        """Masks turned into tokens."""
        return self._sum(2)

    def _sum(self, index: int) -> int:
        self._add_up()
        return 0 if self._sums is None else int(self._sums[index])

    def _add_up(self) -> None:
        """Once in many steps, so that a step has no work with it."""
        if self._steps:
            now = torch.stack([torch.cat(of_steps).sum() for of_steps in zip(*self._steps, strict=True)])
            self._sums = now if self._sums is None else self._sums + now
            self._steps = []

    def add(self, rows: StepRows, hooks: Sequence[Hook], commits: torch.Tensor) -> None:
        """Count one forward pass.

        Args:
            hooks: of the step, which know what its rows attended to.
            commits: [R] int64, of each request.
        """
        self.forwards += 1
        self.steps += len(rows.slots)
        choosing = [hook for hook in hooks if type(hook).keys_attended is not Hook.keys_attended]
        if choosing:
            for r, length in enumerate(rows.lengths):
                seen = [keys for hook in choosing if (keys := hook.keys_attended(r)) is not None]
                self.keys += min(seen, default=length)
        else:
            self.keys += sum(rows.lengths)
        self._extra += sum(rows.extra)
        self._verified += rows.logits_rows.shape[0] - rows.predicted_index[0].shape[0]
        self._steps.append((rows.refreshed, rows.num_predicted, commits))
        if len(self._steps) == _AT_MOST:
            self._add_up()

    def reset(self) -> None:
        """Start again from zero."""
        self.forwards = self.steps = self.keys = self._extra = self._verified = 0
        self._sums, self._steps = None, []
