"""ES-dLLM: rows leave the network early where their hidden states hardly move.

docs/methods/other-caches.md, section 9.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch

from vllm_d2cache.canvas.view import CanvasView, canvas_to_positions
from vllm_d2cache.mechanisms.base import Worker
from vllm_d2cache.mechanisms.row_exits import LetsRowsExit, RowExits
from vllm_d2cache.options.types import Number
from vllm_d2cache.policies.base import CachePolicy, StepOutcome, StepPlan

# Behind the layer at this depth, that share of the rows stays.
PROPORTION_STEPS = ((1 / 8, 0.5), (1 / 4, 0.25))

# What speaks for a row, besides its confidence and its change, which are 1 at most: it is read for the first masked
# slot, for one of the two most confident, or its token has changed. The last is 3 as published; a little more keeps it
# before a mask that is certain, which would otherwise tie with it.
_FIRST_MASK, _CHANGED, _MOST_CONFIDENT = 5.0, 3.5, 2.0


class ESPolicy(CachePolicy):
    """Recomputes the window, and lets most of its rows leave behind an eighth and a quarter of the layers.

    Everything before the window's end is recomputed every ``prompt_update_freq`` steps. In those steps, and every
    ``block_update_freq``, no row leaves.
    """

    name = "es"
    options: ClassVar = {
        "prompt_update_freq": Number(int, 1, note="steps", default=64),
        "block_update_freq": Number(int, 1, note="steps", default=4),
        "importance_score_alpha": Number(float, 0, 1, note="1 = confidence alone, 0 = change alone", default=0.5),
    }
    defaults: ClassVar = {"window": 64, "sigma": 0.0}
    uses = (LetsRowsExit(layers=len(PROPORTION_STEPS)),)

    def __init__(self, worker: Worker) -> None:
        super().__init__(worker)
        # By canvas slot, as the step under way found or finds them.
        self.confidence = torch.zeros(worker.num_slots, worker.max_len, device=worker.device)
        self.masked = torch.zeros(worker.num_slots, worker.max_len, dtype=torch.bool, device=worker.device)

    def first_plan(self, view: CanvasView) -> StepPlan:
        """Everything, and nobody leaves."""
        width = view.masked.shape[1]
        self.confidence[view.slots, :width] = 0
        self.masked[view.slots, :width] = view.masked
        stays = torch.ones_like(view.slots, dtype=torch.bool)
        exits = self._exits(view, view.in_text, torch.zeros_like(view.masked), stays)
        return StepPlan(view.in_text, wishes=(exits,))

    def next_plan(self, view: CanvasView, outcome: StepOutcome) -> StepPlan:
        """The window, and at its start all from the first of the last commits on."""
        slots, width = view.slots, view.masked.shape[1]
        entered = view.window_start != outcome.window_start
        changed = view.masked ^ self.masked[slots, :width]
        self.masked[slots, :width] = view.masked
        confidence = torch.where(outcome.predicted, outcome.score, self.confidence[slots, :width]) * view.masked
        self.confidence[slots, :width] = confidence

        # As published: a window begins with the step number that it would have if those before it had taken a step a
        # slot, whenever they ended.
        number = view.window_start + view.window_step
        prompt_due = number % self.option("prompt_update_freq", view) == 0
        stays = prompt_due | (number % self.option("block_update_freq", view) == 0)
        window_end = (view.window_start + view.options.window).unsqueeze(1)
        since_change = (changed.cumsum(1) > 0) & (view.slot_index < window_end) & entered.unsqueeze(1)
        window = canvas_to_positions(view.in_window | changed | since_change & view.in_canvas, view)
        before_end = view.in_text & (view.position < view.prompt_len.unsqueeze(1) + window_end)
        refresh = window | self.read_from(view.in_window, view) | (before_end & prompt_due.unsqueeze(1))
        return StepPlan(refresh, wishes=(self._exits(view, refresh, changed, stays),))

    def _exits(self, view: CanvasView, refresh: torch.Tensor, changed: torch.Tensor, stays: torch.Tensor) -> RowExits:
        """Who leaves, of the rows ``refresh`` [R, T]; nobody where ``stays`` [R]."""
        alpha = self.option("importance_score_alpha", view).float()
        rows, least = refresh.sum(1), changed.sum(1) + 2
        keep = rows.new_full((len(rows), self.traits.num_layers), -1)
        for depth, share in PROPORTION_STEPS:
            layer = math.ceil(depth * self.traits.num_layers)
            if layer < self.traits.num_layers - 1:
                keep[:, layer] = torch.where(stays, rows, torch.maximum((share * rows).floor().long(), least))

        masks = view.masked & view.live & view.in_window
        first = masks & (masks.cumsum(1) == 1)
        # Statistics that are no probabilities (pc's) must not outweigh the rest.
        confidence = self.confidence[view.slots, : masks.shape[1]].clamp(0, 1)
        order = confidence.masked_fill(~masks, -1).argsort(dim=1, descending=True, stable=True)
        best = torch.zeros_like(masks).scatter_(1, order[:, :2], True) & masks & (alpha > 0).unsqueeze(1)
        for_slots = alpha.unsqueeze(1) * confidence + _FIRST_MASK * first + _MOST_CONFIDENT * best
        # A slot speaks for the row it is read from, a changed token for its own.
        bias = canvas_to_positions(for_slots, view, self.logit_shift) + _CHANGED * canvas_to_positions(changed, view)
        return RowExits(keep, bias, 1 - alpha)
