"""Window-Diffusion: text behind an outer window of masks does not exist yet; only an inner window is recomputed.

docs/methods/other-caches.md, section 10. A phase is ``phase_steps`` steps with one set of visible keys.
"""

from __future__ import annotations

from typing import ClassVar

import torch

from vllm_d2cache.canvas.view import CanvasView, canvas_to_positions
from vllm_d2cache.mechanisms.base import Worker
from vllm_d2cache.mechanisms.hidden_keys import HidesKeys, VisibleKeys
from vllm_d2cache.options.types import Number
from vllm_d2cache.policies.base import CachePolicy, StepOutcome, StepPlan


class WindowDiffusionPolicy(CachePolicy):
    """A phase sees known text and the first ``outer_window`` masks, and commits within the first ``inner_window``.

    Its first step recomputes all it sees; the others the inner window and what the phase has committed (what its first
    step committed only once). A phase whose masks are used up ends early.
    """

    name = "window_diffusion"
    options: ClassVar = {
        "outer_window": Number(int, 1, note="masked positions", default=64),
        "inner_window": Number(int, 1, note="masked positions", default=16),
        "phase_steps": Number(int, 1, note="steps", default=32),
    }
    defaults: ClassVar = {"window": 0, "sigma": 0.0}
    uses = (HidesKeys(),)

    def __init__(self, worker: Worker) -> None:
        super().__init__(worker)
        self.phase_step = torch.zeros(
            worker.num_slots, dtype=torch.int64, device=worker.device
        )  # of the step under way
        self.visible = torch.zeros(
            worker.num_slots, worker.max_len, dtype=torch.bool, device=worker.device
        )  # by position
        # By canvas slot: committed in this phase, but not by its first step.
        self.active = torch.zeros(worker.num_slots, worker.max_len, dtype=torch.bool, device=worker.device)

    def first_plan(self, view: CanvasView) -> StepPlan:
        """The first step of a phase."""
        self.active[view.slots] = False
        self.visible[view.slots] = False
        return self._plan(view, torch.zeros_like(view.slots), torch.zeros_like(view.masked), self._outlook(view))

    def next_plan(self, view: CanvasView, outcome: StepOutcome) -> StepPlan:
        """The next step of the phase, or the first one of the next."""
        length, width = view.num_positions, view.masked.shape[1]
        current = self.phase_step[view.slots]
        visible = self.visible[view.slots, :length]
        used_up = ~(visible & canvas_to_positions(_open(view), view)).any(1)
        step = torch.where(used_up | (current + 1 >= self.option("phase_steps", view)), 0, current + 1)
        begins = (step == 0).unsqueeze(1)

        stays = outcome.committed & (current > 0).unsqueeze(1)
        active = (self.active[view.slots, :width] | stays) & ~begins
        self.active[view.slots, :width] = active
        visible = torch.where(begins, self._outlook(view), visible)
        return self._plan(view, step, active | outcome.committed, visible)

    def _plan(self, view: CanvasView, step: torch.Tensor, again: torch.Tensor, visible: torch.Tensor) -> StepPlan:
        """Step number ``step`` [R] of phases that see ``visible`` [R, T]; slots ``again`` [R, G] are refreshed too."""
        self.phase_step[view.slots] = step
        self.visible[view.slots, : view.num_positions] = visible
        in_sight = visible.gather(1, (view.prompt_len.unsqueeze(1) + view.slot_index).clamp(max=view.num_positions - 1))
        inner = _first(_open(view) & in_sight, self.option("inner_window", view))
        refresh = canvas_to_positions(inner | again, view) | self.read_from(inner, view)
        refresh = torch.where((step == 0).unsqueeze(1), visible, refresh)
        return StepPlan(refresh, None, inner, (VisibleKeys(visible),))

    def _outlook(self, view: CanvasView) -> torch.Tensor:
        """[R, T] bool: what a phase that begins now sees."""
        ahead = canvas_to_positions(_first(_open(view), self.option("outer_window", view)), view)
        return (view.in_text & ~canvas_to_positions(view.masked, view)) | ahead


def _open(view: CanvasView) -> torch.Tensor:
    """[R, G] bool: masks that may still become tokens."""
    return view.masked & view.live


def _first(slots: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """[R, G] bool: the leftmost ``count`` [R] of ``slots``."""
    return slots & (slots.cumsum(1) <= count.unsqueeze(1))
