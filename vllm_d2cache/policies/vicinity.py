"""dInfer's vicinity refresh: the window and some positions on both sides of it.

docs/methods/other-caches.md, section 6.1. The published code does not write the recomputed K and V back. Nothing
depends on that: the refresh set is the same in all steps of a window, so what a step leaves behind is overwritten
before it is read again, and the next window begins with everything. Here they are written, like all others.
"""

from __future__ import annotations

from typing import ClassVar

import torch

from vllm_d2cache.canvas.view import CanvasView
from vllm_d2cache.options.types import Number
from vllm_d2cache.policies.base import CachePolicy, StepOutcome, StepPlan


class VicinityPolicy(CachePolicy):
    """``prefix_look`` positions before the window, the window, and ``after_look`` behind it.

    Everything is recomputed in the first ``warmup_steps`` + 1 steps of a request, at the start of every window but the
    first, and, behind the first window, in every step whose number is a multiple of ``cache_update_freq``.
    """

    name = "vicinity"
    options: ClassVar = {
        "prefix_look": Number(int, 0, note="positions", default=16),
        "after_look": Number(int, 0, note="positions", default=16),
        "warmup_steps": Number(int, 0, note="steps", default=4),
        "cache_update_freq": Number(int, 0, note="steps; 0 = off", default=0),
    }
    defaults: ClassVar = {"window": 32, "sigma": 0.0}

    def next_plan(self, view: CanvasView, outcome: StepOutcome) -> StepPlan:
        """Everything where it is due, else the vicinity of the window."""
        step = view.step
        every = self.option("cache_update_freq", view)
        again = (view.window_start != outcome.window_start) | ((every > 0) & (step % every.clamp(min=1) == 0))
        due = (step <= self.option("warmup_steps", view)) | ((view.window_start > 0) & again)
        return StepPlan(torch.where(due.unsqueeze(1), view.in_text, self._vicinity(view)))

    def _vicinity(self, view: CanvasView) -> torch.Tensor:
        """[R, T] bool."""
        start = view.prompt_len + view.window_start
        end = torch.minimum(start + view.options.window, view.prompt_len + view.canvas_len)
        low = (start - self.option("prefix_look", view)).unsqueeze(1)
        high = (end + self.option("after_look", view)).unsqueeze(1)
        around = (view.position >= low) & (view.position < high) & view.in_text
        return around | self.read_from(view.in_window, view)
