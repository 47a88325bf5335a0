"""dKV-Cache: a token's K and V are cached one step after it was committed, when they have settled.

rivals.md, section 1. What is left out of a step is what was known before the previous one.
"""

from __future__ import annotations

from typing import ClassVar

import torch

from vllm_d2cache.canvas.states import canvas_to_positions
from vllm_d2cache.canvas.view import CanvasView, StepOutcome, StepPlan
from vllm_d2cache.mechanisms.base import Worker
from vllm_d2cache.options.server import RequestOptions
from vllm_d2cache.options.types import Choice, Number
from vllm_d2cache.policies.base import CachePolicy, nothing

DECODE, PREFILL, PD = VARIANTS = ("decode", "prefill", "pd")


class DKVPolicy(CachePolicy):
    """Three variants: ``decode`` caches known text, ``prefill`` the prompt for good, ``pd`` both.

    ``decode`` recomputes everything, ``pd`` the canvas, in the first step of a window and every ``cache_steps`` steps
    after it; ``decode`` also in the second step, as published: its first step stores nothing.
    """

    name = "dkv"
    options: ClassVar = {
        "dkv_variant": Choice(VARIANTS, default=DECODE),
        "cache_steps": Number(int, 1, note="steps; 1 = cache nothing", default=8),
    }
    defaults: ClassVar = {"window": 32, "sigma": 0.0}

    def __init__(self, worker: Worker) -> None:
        super().__init__(worker)
        self.window_step = torch.zeros(
            worker.num_slots, dtype=torch.int64, device=worker.device
        )  # of the step under way

    @staticmethod
    def max_rows(options: RequestOptions, prompt_len: int, canvas_len: int, refresh_budget: int | None) -> int:
        """All positions for ``decode``; else the canvas and, in a shifted family, the position before it."""
        if options.value("dkv_variant") == DECODE:
            return prompt_len + canvas_len
        return min(prompt_len, 1) + canvas_len

    def first_plan(self, view: CanvasView) -> StepPlan:
        """Everything."""
        self.window_step[view.slots] = 0
        return super().first_plan(view)

    def next_plan(self, view: CanvasView, outcome: StepOutcome) -> StepPlan:
        """Masked positions, the last commits, and now and then all that may be refreshed."""
        variant = self.option("dkv_variant", view).unsqueeze(1)
        every = self.option("cache_steps", view)
        step = torch.where(view.window_start != outcome.window_start, 0, self.window_step[view.slots] + 1)
        self.window_step[view.slots] = step
        due = (step % every == 0).unsqueeze(1)
        decode = variant == VARIANTS.index(DECODE)
        due |= decode & (step == 1).unsqueeze(1)

        canvas = self._with_source(view.in_canvas, view)
        changing = self._with_source(view.masked, view) | canvas_to_positions(outcome.committed, view)
        refreshable = torch.where(decode, view.in_text, canvas)
        always = torch.where(variant == VARIANTS.index(PREFILL), canvas, changing)
        return StepPlan(torch.where(due, refreshable, always), nothing(view))

    def _with_source(self, slots: torch.Tensor, view: CanvasView) -> torch.Tensor:
        """[R, T] bool: the positions of ``slots`` and those their logits are read from.

        The published code for shifted families leaves a masked position out as soon as its right neighbour is known,
        and keeps the K and V of a mask after it has become a token; here neither is left out.
        """
        return canvas_to_positions(slots, view) | self.read_from(slots, view)
