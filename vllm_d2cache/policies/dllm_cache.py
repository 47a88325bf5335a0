"""dLLM-Cache: layers keep their outputs; a step computes the rows whose values have changed most.

docs/methods/d2cache.md, section 6, and the exact cheaper forms of docs/methods/other-caches.md, section 5.
"""

from __future__ import annotations

from typing import ClassVar

import torch

from vllm_d2cache.canvas.view import CanvasView, canvas_to_positions
from vllm_d2cache.mechanisms.stored_outputs import StoredOutputs, StoresOutputs
from vllm_d2cache.options.types import Number
from vllm_d2cache.policies.base import CachePolicy, StepOutcome, StepPlan


class DLLMCachePolicy(CachePolicy):
    """Prompt every ``kp`` steps, canvas every ``kr`` steps; in between a share ``rou`` of the canvas in each layer.

    The first layer always computes the whole canvas. Prompt rows leave the network between their refreshes: there
    nothing but their K and V is read, and those do not change.
    """

    name = "dllm_cache"
    options: ClassVar = {
        "kp": Number(int, 1, note="steps", default=50),
        "kr": Number(int, 1, note="steps", default=4),
        "rou": Number(float, 0, 1, note="share of the canvas", default=0.25),
    }
    defaults: ClassVar = {"window": 32, "sigma": 0.0}
    uses = (StoresOutputs(),)

    def first_plan(self, view: CanvasView) -> StepPlan:
        """Everything, in all layers."""
        return self._plan(view, view.step)

    def next_plan(self, view: CanvasView, outcome: StepOutcome) -> StepPlan:
        """The canvas, and the prompt where it is due."""
        return self._plan(view, view.step)

    def _plan(self, view: CanvasView, step: torch.Tensor) -> StepPlan:
        """Step number ``step`` [R]."""
        prompt_due, canvas_due = (due.unsqueeze(1) for due in self._due(view, step))
        canvas = canvas_to_positions(view.in_canvas, view)
        # In a shifted family the first slot is read from a prompt row, which goes on with what its layers stored.
        source = self.read_from(view.in_canvas, view) & ~canvas
        stored = StoredOutputs(
            rows=(canvas & ~canvas_due) | (source & ~prompt_due),
            compared=canvas & ~canvas_due & self._compares(view).unsqueeze(1),
            count=self._count(view),
            proxy_rank=self._proxy_rank(view),
        )
        refresh = torch.where(prompt_due, view.in_text, canvas | source)
        return StepPlan(refresh, wishes=(stored,))

    def _due(self, view: CanvasView, step: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Two of [R] bool: the prompt is refreshed; the canvas is."""
        return step % self.option("kp", view) == 0, step % self.option("kr", view) == 0

    def _compares(self, view: CanvasView) -> torch.Tensor:
        """[R] bool: layers compare the rows of the canvas."""
        return self.option("rou", view) > 0

    def _count(self, view: CanvasView) -> torch.Tensor:
        """[R, layers - 1] int64: rows that each layer computes of those it compares."""
        count = (self.option("rou", view) * view.canvas_len).floor().long()
        return count.unsqueeze(1).expand(-1, self.traits.num_layers - 1)

    def _proxy_rank(self, view: CanvasView) -> torch.Tensor | None:
        """[R] int64: compared are so many components of the values; None = the values."""
        return None
