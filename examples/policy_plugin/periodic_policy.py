"""A cache policy from outside the package: the window in every step, everything in every ``period``-th."""

from __future__ import annotations

from typing import ClassVar

import torch

from vllm_d2cache.policies import CachePolicy, CanvasView, Number, RequestOptions, StepOutcome, StepPlan


class PeriodicPolicy(CachePolicy):
    """Like ``dual``, but it refreshes everything by the clock and not by the window."""

    name = "periodic"
    options: ClassVar = {"period": Number(int, 1, note="steps", default=8)}
    defaults: ClassVar = {"window": 32, "sigma": 0.0}

    @staticmethod
    def max_rows(options: RequestOptions, prompt_len: int, canvas_len: int, refresh_budget: int | None) -> int:
        """All positions, in every ``period``-th step."""
        return prompt_len + canvas_len

    def next_plan(self, view: CanvasView, outcome: StepOutcome) -> StepPlan:
        """All requests of the step at once; each row of a tensor is a request and depends on that row alone."""
        due = (view.step % self.option("period", view) == 0).unsqueeze(1)
        return StepPlan(torch.where(due, view.in_text, self.read_from(view.in_window, view)))
