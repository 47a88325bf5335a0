"""For texts cut into blocks whose rows see their own block and those before it: recompute the block being written.

Exact: K and V of a block never change once they have been computed from its final tokens. See docs/policies.md.
"""

from __future__ import annotations

from typing import ClassVar

import torch

from vllm_d2cache.canvas.view import CanvasView
from vllm_d2cache.options.types import Choice
from vllm_d2cache.policies.base import StepOutcome, StepPlan, nothing
from vllm_d2cache.policies.open_block import Due, OpenBlockPolicy, between

_OFF, _ON = "off", "on"


class BlockPolicy(OpenBlockPolicy):
    """The open block; with ``block_cache``, once all of it has been computed, its window alone."""

    name = "block"
    options: ClassVar = {"block_cache": Choice((_OFF, _ON), default=_OFF)}

    def owes(self, view: CanvasView, outcome: StepOutcome) -> torch.Tensor:
        """Also one of which rows were left out."""
        return super().owes(view, outcome) | (self.option("block_cache", view) > 0)

    def choose(self, view: CanvasView, outcome: StepOutcome | None, due: Due) -> StepPlan:
        """What is due, or the window."""
        window = view.prompt_len + view.window_start
        partial = due.again & (self.option("block_cache", view) > 0) & ~self.masked_at(view, window)
        alone = between(view, window, window + view.options.window)
        return StepPlan(torch.where(partial.unsqueeze(1), alone, due.whole), nothing(view))
