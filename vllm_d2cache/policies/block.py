"""For texts cut into blocks whose rows see their own block and those before it: recompute the block being written.

Exact: K and V of a block never change once they have been computed from its final tokens. See docs/policies.md.
"""

from __future__ import annotations

from typing import ClassVar

import torch

from vllm_d2cache.canvas.view import CanvasView
from vllm_d2cache.mechanisms.base import Worker
from vllm_d2cache.options.request import RequestOptions
from vllm_d2cache.options.types import Choice
from vllm_d2cache.policies.base import CachePolicy, StepOutcome, StepPlan, nothing

_OFF, _ON = "off", "on"


class BlockPolicy(CachePolicy):
    """Recomputes the current block, and with its first step the block before, whose tokens have only become final.

    Where a slot is read left of its position, a block's first slot is read from the block before: then that one is
    computed alone, and gives its successor's first token. Where text is not cut into blocks, all of it is one.
    """

    name = "block"
    keeps_blocks = True
    defaults: ClassVar = {"window": 0, "sigma": 0.0}
    options: ClassVar = {"block_cache": Choice((_OFF, _ON), default=_OFF)}

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

    def first_plan(self, view: CanvasView) -> StepPlan:
        """The prompt's whole blocks, and the one that it ends in."""
        self._begun[view.slots] = -1
        return self._plan(view, torch.zeros_like(view.prompt_len))

    def next_plan(self, view: CanvasView, outcome: StepOutcome) -> StepPlan:
        """The current block; and the last one, if the step that it ended with did not have its final tokens yet."""
        if self.length is None:
            return StepPlan(view.in_text, nothing(view))
        left, start = self._block_start(view, outcome.window_start), self._block_start(view, view.window_start)
        stale = outcome.committed.any(1) | (self.option("block_cache", view) > 0)
        return self._plan(view, torch.where(stale, torch.minimum(left, start), start))

    def _block_start(self, view: CanvasView, window_start: torch.Tensor) -> torch.Tensor:
        """[R] int64: the position where the block of a window begins."""
        assert self.length is not None
        position = view.prompt_len + window_start
        return position - position % self.length

    def _plan(self, view: CanvasView, since: torch.Tensor) -> StepPlan:
        """Positions from ``since`` [R] on, which are not stored, to the end of the current block."""
        if self.length is None:
            return StepPlan(view.in_text, nothing(view))
        start = self._block_start(view, view.window_start)
        end = start + self.length
        if self.logit_shift:
            # The first slot's row must have seen nothing of its block.
            inherits = self._masked_at(view, start)
            end = torch.where(inherits, start, end)
            since = torch.where(inherits, torch.minimum(since, (start - self.length).clamp(min=0)), since)
        window = view.prompt_len + view.window_start
        partial = (self.option("block_cache", view) > 0) & (since == start) & (self._begun[view.slots] == start)
        partial &= ~self._masked_at(view, window)
        self._begun[view.slots] = torch.where(
            (since <= start) & (end > start) & ~partial, start, self._begun[view.slots]
        )
        since = torch.where(partial, window, since)
        end = torch.where(partial, window + view.options.window, end)
        position = view.position
        refresh = (position >= since.unsqueeze(1)) & (position < end.unsqueeze(1))
        return StepPlan(refresh & view.in_text, nothing(view))

    def _masked_at(self, view: CanvasView, position: torch.Tensor) -> torch.Tensor:
        """[R] bool: ``position`` [R] is a slot with a mask."""
        slot = position - view.prompt_len
        masked = view.open.gather(1, slot.clamp(0, view.masked.shape[1] - 1).unsqueeze(1)).squeeze(1)
        return masked & (slot >= 0)
