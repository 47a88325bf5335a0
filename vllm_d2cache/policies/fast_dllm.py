"""Fast-dLLM: recompute everything at the start of a window, then only the window, or the window and all behind it.

docs/methods/d2cache.md, section 5. A window is what the method calls a block.
"""

from __future__ import annotations

from typing import ClassVar

import torch

from vllm_d2cache.canvas.view import CanvasView
from vllm_d2cache.policies.base import CachePolicy, StepOutcome, StepPlan


class PrefixPolicy(CachePolicy):
    """Keeps the text before the window: refreshes every slot from the window's start on."""

    name = "prefix"
    defaults: ClassVar = {"window": 32, "sigma": 0.0}

    def next_plan(self, view: CanvasView, outcome: StepOutcome) -> StepPlan:
        """Everything where a window has been completed, else the slots that stay fresh."""
        entered = (view.window_start != outcome.window_start).unsqueeze(1)
        refresh = torch.where(entered, view.in_text, self.read_from(self._fresh(view), view))
        return StepPlan(refresh)

    def _fresh(self, view: CanvasView) -> torch.Tensor:
        """[R, G] bool: the slots recomputed in every step of the window."""
        return view.slot_index >= view.window_start.unsqueeze(1)


class DualPolicy(PrefixPolicy):
    """Keeps the text on both sides of the window: refreshes the window's slots alone."""

    name = "dual"

    def _fresh(self, view: CanvasView) -> torch.Tensor:
        return view.in_window
