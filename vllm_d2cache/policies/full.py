"""Full recompute: every position in every step. Exact, and the yardstick of all other policies."""

from __future__ import annotations

from vllm_d2cache.canvas.view import CanvasView
from vllm_d2cache.policies.base import CachePolicy, StepOutcome, StepPlan
from vllm_d2cache.policies.full_blocks import FullInBlocks


class FullPolicy(CachePolicy):
    """Recomputes everything; reads nothing.

    The yardstick: a request is compared with it by changing its policy alone, the options of the other one stay.
    """

    name = "full"
    takes_all_options = True
    refreshes_all = True
    in_blocks = FullInBlocks

    def next_plan(self, view: CanvasView, outcome: StepOutcome) -> StepPlan:
        """Everything again."""
        return StepPlan(view.in_text)
