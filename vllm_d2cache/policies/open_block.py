"""What policies share where texts are cut into blocks: what is stored, what is still open, and when a block is entered.

K and V of a block never change once they have been computed from its final tokens (docs/policies.md).
"""

from __future__ import annotations

from typing import ClassVar, NamedTuple

import torch

from vllm_d2cache.canvas.view import CanvasView
from vllm_d2cache.mechanisms.base import Worker
from vllm_d2cache.options.request import RequestOptions
from vllm_d2cache.policies.base import CachePolicy, StepOutcome, StepPlan


class Due(NamedTuple):
    """What the next step of each request computes unless its policy leaves some of the open block out."""

    start: torch.Tensor  # [R] int64, the position where the open block begins
    whole: torch.Tensor  # [R, T] bool: the open block, and what comes before it and is not stored
    # [R] bool: all rows of the open block have been computed before, none before it is owed, and it is computed at all.
    again: torch.Tensor


class OpenBlockPolicy(CachePolicy):
    """Recomputes the open block, and with its first step the block before, whose tokens have only become final.

    Where a slot is read left of its position, a block's first slot is read from the block before: then that one is
    computed alone, and gives its successor's first token. Where text is not cut into blocks, all of it is one.
    Subclasses may leave rows out of a block that has been computed before (:meth:`choose`): the error ends with the
    block, as it is stored whole.
    """

    keeps_blocks = True
    defaults: ClassVar = {"window": 0, "sigma": 0.0}

    def __init__(self, worker: Worker) -> None:
        super().__init__(worker)
        self.length = worker.traits.block_length
        # Where the block begins of which all rows have been computed at least once.
        self._begun = torch.full((worker.num_slots,), -1, dtype=torch.int64, device=worker.device)

    @staticmethod
    def max_rows(options: RequestOptions, prompt_len: int, canvas_len: int, refresh_budget: int | None) -> int:
        """Two blocks: one that is stored, and the next one's first step."""
        whole = prompt_len + canvas_len
        return min(2 * options.block, whole) if options.block else whole

    def owes(self, view: CanvasView, outcome: StepOutcome) -> torch.Tensor:
        """[R] bool: a block that the step has ended is to be computed once more."""
        return outcome.committed.any(1)

    def choose(self, view: CanvasView, outcome: StepOutcome | None, due: Due) -> StepPlan:
        """The plan: what is due, or less of the open block where ``due.again``.

        Args:
            outcome: of the last step; None = there was none.
        """
        return StepPlan(due.whole)

    def first_plan(self, view: CanvasView) -> StepPlan:
        """The prompt's whole blocks, and the one that it ends in."""
        if self.length is None:
            return StepPlan(view.in_text)
        self._begun[view.slots] = -1
        start = self.block_start(view, view.window_start)
        return self.choose(view, None, self._due(view, torch.zeros_like(start), start))

    def next_plan(self, view: CanvasView, outcome: StepOutcome) -> StepPlan:
        """The open block; and the last one, if the step that it ended with did not have its final tokens yet."""
        if self.length is None:
            return StepPlan(view.in_text)
        left, start = self.block_start(view, outcome.window_start), self.block_start(view, view.window_start)
        since = torch.where(self.owes(view, outcome), torch.minimum(left, start), start)
        return self.choose(view, outcome, self._due(view, since, start))

    def block_start(self, view: CanvasView, window_start: torch.Tensor) -> torch.Tensor:
        """[R] int64: the position where the block of a window begins."""
        assert self.length is not None
        position = view.prompt_len + window_start
        return position - position % self.length

    def _due(self, view: CanvasView, since: torch.Tensor, start: torch.Tensor) -> Due:
        """Positions from ``since`` [R] on, which are not stored, to the end of the block that begins at ``start``."""
        assert self.length is not None
        end = start + self.length
        if self.logit_shift:
            # The first slot's row must have seen nothing of its block.
            inherits = self.masked_at(view, start)
            end = torch.where(inherits, start, end)
            since = torch.where(inherits, torch.minimum(since, (start - self.length).clamp(min=0)), since)
        begun, computed = self._begun[view.slots], (since <= start) & (end > start)
        again = computed & (since == start) & (begun == start)
        self._begun[view.slots] = torch.where(computed, start, begun)
        return Due(start, between(view, since, end), again)

    def masked_at(self, view: CanvasView, position: torch.Tensor) -> torch.Tensor:
        """[R] bool: ``position`` [R] is a slot with a mask."""
        slot = position - view.prompt_len
        masked = view.open.gather(1, slot.clamp(0, view.masked.shape[1] - 1).unsqueeze(1)).squeeze(1)
        return masked & (slot >= 0)


def between(view: CanvasView, since: torch.Tensor, end: torch.Tensor) -> torch.Tensor:
    """[R, T] bool: positions of the text from ``since`` [R] on and before ``end`` [R]."""
    position = view.position
    return (position >= since.unsqueeze(1)) & (position < end.unsqueeze(1)) & view.in_text
