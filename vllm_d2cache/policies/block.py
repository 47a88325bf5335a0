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
from vllm_d2cache.policies.base import StepOutcome, StepPlan
from vllm_d2cache.policies.open_block import Due, OpenBlockPolicy, between

_OFF, _ON = "off", "on"


class BlockPolicy(OpenBlockPolicy):
    """The open block; with ``block_cache``, once all of it has been computed, its window alone."""

    name = "block"
    options: ClassVar = {"block_cache": Choice((_OFF, _ON), default=_OFF)}

    def __init__(self, worker: Worker) -> None:
        super().__init__(worker)
        self._narrow: set[int] = set()  # slots whose latest request of this policy may leave rows of its block out

    def start(self, slot: int, options: RequestOptions) -> None:
        super().start(slot, options)
        (self._narrow.add if options.value("block_cache") == _ON else self._narrow.discard)(slot)

    def owes(self, view: CanvasView, outcome: StepOutcome) -> torch.Tensor:
        """Also one of which rows were left out."""
        if not self._narrow:
            return super().owes(view, outcome)
        return super().owes(view, outcome) | (self.option("block_cache", view) > 0)

    def choose(self, view: CanvasView, outcome: StepOutcome | None, due: Due) -> StepPlan:
        """What is due, or the window."""
        if not self._narrow:
            return super().choose(view, outcome, due)
        window = view.prompt_len + view.window_start
        partial = due.again & (self.option("block_cache", view) > 0) & ~self.masked_at(view, window)
        alone = between(view, window, window + view.options.window)
        return StepPlan(torch.where(partial.unsqueeze(1), alone, due.whole))
