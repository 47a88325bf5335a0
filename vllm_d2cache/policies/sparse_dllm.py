"""Sparse-dLLM: behind the second step of a window, every layer keeps only the keys its queries score highest.

docs/methods/other-caches.md, section 2.
"""

from __future__ import annotations

from typing import ClassVar

import torch

from vllm_d2cache.canvas.view import CanvasView, canvas_to_positions
from vllm_d2cache.mechanisms.hidden_keys import HidesKeys, KeptKeys, VisibleKeys
from vllm_d2cache.options.types import Number
from vllm_d2cache.policies.base import CachePolicy, StepOutcome, StepPlan


class SparseDLLMPolicy(CachePolicy):
    """The first two steps of a window recompute everything; later ones the window alone.

    In the second step each layer chooses which of the keys outside the window it keeps: ``keep_ratio`` of them, by the
    best score that the window's mean query gives within ``kernel_size`` neighbours.
    """

    name = "sparse_dllm"
    options: ClassVar = {
        "keep_ratio": Number(float, 0, 1, note="share of the keys outside the window", default=0.5),
        "kernel_size": Number(int, 1, note="positions; 1 = no pooling", default=3),
    }
    defaults: ClassVar = {"window": 32, "sigma": 0.0}
    uses = (HidesKeys(),)

    def first_plan(self, view: CanvasView) -> StepPlan:
        """Everything, and all of it visible."""
        return self._plan(view, view.window_step)

    def next_plan(self, view: CanvasView, outcome: StepOutcome) -> StepPlan:
        """Everything in the first two steps of a window, then the window."""
        return self._plan(view, view.window_step)

    def _plan(self, view: CanvasView, step: torch.Tensor) -> StepPlan:
        """Step number ``step`` [R] of the current windows."""
        fresh = canvas_to_positions(view.in_window, view) | self.read_from(view.in_window, view)
        outside = (view.in_text & ~fresh).sum(1)
        kept = KeptKeys(
            choose=step == 1,
            apply=step >= 2,
            number=(self.option("keep_ratio", view) * outside).floor().long(),
            pool=self.option("kernel_size", view),
        )
        refresh = torch.where((step <= 1).unsqueeze(1), view.in_text, fresh)
        visible = torch.where((step == 0).unsqueeze(1), view.in_text, fresh)
        return StepPlan(refresh, wishes=(VisibleKeys(visible, kept),))
