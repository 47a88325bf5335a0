"""Streaming-dLLM: prefix caching on a text whose far suffix is left out.

docs/methods/other-caches.md, section 11. Only the cache: the method's threshold schedule belongs to decoding.
"""

from __future__ import annotations

from typing import ClassVar

import torch

from vllm_d2cache.canvas.view import CanvasView, canvas_to_positions
from vllm_d2cache.mechanisms.hidden_keys import HidesKeys, VisibleKeys
from vllm_d2cache.options.types import Number
from vllm_d2cache.policies.base import CachePolicy, StepOutcome, StepPlan


class StreamingPolicy(CachePolicy):
    """Sees the text up to ``suffix_window`` positions behind the window, and the last position of the canvas.

    The first step of a window recomputes all it sees, the others the window and what is seen behind it.
    """

    name = "streaming"
    options: ClassVar = {"suffix_window": Number(int, 0, note="positions", default=32)}
    defaults: ClassVar = {"window": 32, "sigma": 0.0}
    uses = (HidesKeys(),)

    def first_plan(self, view: CanvasView) -> StepPlan:
        """All that the first window sees."""
        visible = self._visible(view)
        return StepPlan(visible, wishes=(VisibleKeys(visible),))

    def next_plan(self, view: CanvasView, outcome: StepOutcome) -> StepPlan:
        """All that is seen where a window has been completed, else the window and what is seen behind it."""
        visible = self._visible(view)
        onwards = canvas_to_positions(view.slot_index >= view.window_start.unsqueeze(1), view)
        fresh = (visible & onwards) | self.read_from(view.in_window, view)
        entered = (view.window_start != outcome.window_start).unsqueeze(1)
        return StepPlan(torch.where(entered, visible, fresh), wishes=(VisibleKeys(visible),))

    def _visible(self, view: CanvasView) -> torch.Tensor:
        """[R, T] bool."""
        start = view.prompt_len + view.window_start
        end = (start + view.options.window + self.option("suffix_window", view)).unsqueeze(1)
        last = (view.prompt_len + view.canvas_len - 1).unsqueeze(1)
        return ((view.position < end) | (view.position == last)) & view.in_text
