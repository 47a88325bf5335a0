"""A cache policy from outside the package: the window in every step, everything in every ``period``-th."""

from __future__ import annotations

from typing import ClassVar

import torch

from vllm_d2cache.canvas.view import CanvasView
from vllm_d2cache.options.request import RequestOptions
from vllm_d2cache.options.types import Number
from vllm_d2cache.policies import CachePolicy
from vllm_d2cache.policies.base import StepOutcome, StepPlan


class PeriodicPolicy(CachePolicy):
    """Like ``dual``, but it refreshes everything by the clock and not by the window."""

    name = "periodic"
    options: ClassVar = {"period": Number(int, 1, note="steps", default=8)}
    defaults: ClassVar = {"window": 32, "sigma": 0.0}

    def __init__(
        self, num_slots: int, max_len: int, device: torch.device, logit_shift: int, refresh_budget: int | None
    ) -> None:
        super().__init__(num_slots, max_len, device, logit_shift, refresh_budget)
        # What a policy remembers has a line for each slot, and is overwritten in first_plan.
        self.step = torch.zeros(num_slots, dtype=torch.int64, device=device)

    @staticmethod
    def max_rows(options: RequestOptions, prompt_len: int, canvas_len: int, refresh_budget: int | None) -> int:
        """All positions, in every ``period``-th step."""
        return prompt_len + canvas_len

    def first_plan(self, view: CanvasView) -> StepPlan:
        """Everything."""
        self.step[view.slots] = 0
        return super().first_plan(view)

    def next_plan(self, view: CanvasView, outcome: StepOutcome) -> StepPlan:
        """All requests of the step at once; each row of a tensor is a request and depends on that row alone."""
        self.step[view.slots] += 1
        due = (self.step[view.slots] % self.option("period", view) == 0).unsqueeze(1)
        refresh = torch.where(due, view.in_text, self.read_from(view.in_window, view))
        return StepPlan(refresh, torch.zeros_like(view.masked))
