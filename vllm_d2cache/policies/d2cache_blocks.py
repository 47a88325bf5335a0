"""d2Cache inside a block: the open block is the canvas.

Stage 1 of docs/methods/d2cache.md (sections 3.2 and 3.3) with the block as its canvas: what lies before it is known.
There is no stage 2: K and V before the block are exact, and of the block's own tokens the latest are computed again as
far as ``current_k`` goes (docs/methods/block-diffusion.md, section 8).
"""

from __future__ import annotations

from typing import ClassVar

import torch

from vllm_d2cache.canvas.view import CanvasView, positions_to_canvas
from vllm_d2cache.mechanisms.base import Worker
from vllm_d2cache.ops.canvas_columns import to_positions
from vllm_d2cache.ops.density import certainty_density
from vllm_d2cache.ops.refresh_choice import Outcome, inflate, select_masked
from vllm_d2cache.policies.base import StepOutcome, StepPlan
from vllm_d2cache.policies.d2cache_options import LATEST, MEMORIES, OPTIONS
from vllm_d2cache.policies.open_block import Due, OpenBlockPolicy


class D2CacheInBlocks(OpenBlockPolicy):
    """Of a block that has been computed once: the last commits, and ``current_k`` rows besides.

    These are the masks of the best confidence times density, the window's first; where there are fewer, the known
    positions that were committed last. A block without masks, one that is entered and one that is stored are computed
    whole, and so is every block of at most ``current_k`` positions.
    """

    name = "d2cache"
    options: ClassVar = {name: spec for name, spec in OPTIONS.items() if name != "rollout_p"}
    own_defaults: ClassVar = {"current_k": 8}
    parallel_defaults: ClassVar = {"inflate_w": 4}

    def __init__(self, worker: Worker) -> None:
        super().__init__(worker)
        b, slots, device = self.length or 1, worker.num_slots, worker.device
        # By place in the open block: confidences, and the number of the step that committed it; -1 = none has.
        self.memory = torch.zeros(slots, b, device=device)
        self.when = torch.zeros(slots, b, dtype=torch.int64, device=device)
        # Whether the last plan was the first for its block, and whether it left rows of it out.
        self.entered, self.partial = torch.zeros(2, slots, dtype=torch.bool, device=device)

    def owes(self, view: CanvasView, outcome: StepOutcome) -> torch.Tensor:
        """Also one of which rows were left out."""
        return super().owes(view, outcome) | self.partial[view.slots]

    def choose(self, view: CanvasView, outcome: StepOutcome | None, due: Due) -> StepPlan:
        """What is due, or of the open block what matters; the confidences that a block is entered with are taken."""
        assert self.length is not None
        refresh, whole = due.whole, torch.ones_like(due.again)
        if outcome is not None:
            rows, masks = self._part(view, outcome, due.start)
            whole = ~(due.again & masks & (self.option("current_k", view) < self.length))
            length = torch.full_like(due.start, self.length)
            refresh = torch.where(whole.unsqueeze(1), refresh, to_positions(rows, due.start, length, refresh.shape[1]))
        self.entered[view.slots], self.partial[view.slots] = ~due.again, ~whole
        latest = self.option("confidence_memory", view) == MEMORIES.index(LATEST)
        first = due.start - view.prompt_len
        slot, end = view.slot_index, first + self.length
        mine = (slot >= first.unsqueeze(1)) & (slot < end.unsqueeze(1)) & view.open
        observe = positions_to_canvas(refresh, view, self.logit_shift) & mine & (whole | latest).unsqueeze(1)
        return StepPlan(refresh, observe)

    def _part(self, view: CanvasView, outcome: StepOutcome, start: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the block that begins at ``start`` [R]: rows to compute [R, b] bool, and [R] bool whether it has masks."""
        assert self.length is not None
        slots, first, shift = view.slots, start - view.prompt_len, self.logit_shift
        slot = first.unsqueeze(1) + torch.arange(self.length, device=start.device)
        inside = (slot >= 0) & (slot < view.canvas_len.unsqueeze(1))
        slot = slot.clamp(0, view.masked.shape[1] - 1)

        def of(values: torch.Tensor) -> torch.Tensor:
            return torch.where(inside, values.gather(1, slot), 0).to(values.dtype)

        masked, committed, entered = of(view.open), of(outcome.committed), self.entered[slots]
        when = self.when[slots].masked_fill(entered.unsqueeze(1), -1)
        self.when[slots] = when = torch.where(committed, view.step.unsqueeze(1), when)
        integers = view.texts.integers.clone()
        integers[1] = self.length
        density = certainty_density(masked, integers[1], self.option("selection_sigma", view).float(), masks=True)
        found = Outcome(of(outcome.predicted), of(outcome.score), entered, view.window_start - first)
        columns = self._options.columns
        memory = (self.memory, columns["confidence_memory"], columns["current_k"])
        selected = select_masked(slots, *memory, density, integers, masked, inside | masked, found)
        left = self.option("current_k", view) - selected.sum(1)
        order = torch.where(masked | committed, -2, when).argsort(dim=1, descending=True, stable=True)
        rank = torch.arange(self.length, device=start.device).expand_as(order)
        known = torch.zeros_like(masked).scatter_(1, order, rank < left.unsqueeze(1)) & ~masked
        read = torch.nn.functional.pad(selected[:, shift:], (0, shift)) if shift else selected
        return inflate(read | committed | known, self.option("inflate_w", view)), masked.any(1)
