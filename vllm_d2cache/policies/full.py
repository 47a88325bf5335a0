"""Full recompute: every position in every step. Exact, and the yardstick of all other policies."""

from __future__ import annotations

import torch

from vllm_d2cache.canvas.view import CanvasView
from vllm_d2cache.options.request import RequestOptions
from vllm_d2cache.policies.base import CachePolicy, StepOutcome, StepPlan


class FullPolicy(CachePolicy):
    """Recomputes everything; reads nothing.

    The yardstick: a request is compared with it by changing its policy alone, the options of the other one stay.
    """

    name = "full"
    takes_all_options = True
    refreshes_all = True

    @staticmethod
    def max_rows(options: RequestOptions, prompt_len: int, canvas_len: int, refresh_budget: int | None) -> int:
        """All positions; a refresh budget does not apply, or the policy would not be what it says."""
        return prompt_len + canvas_len

    def next_plan(self, view: CanvasView, outcome: StepOutcome) -> StepPlan:
        """Everything again."""
        return StepPlan(view.in_text, torch.zeros_like(view.masked))
