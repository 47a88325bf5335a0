"""dKV-Cache: a token's K and V are cached one step after it was committed, when they have settled.

docs/methods/other-caches.md, section 1. What is left out of a step is what was known before the previous one.
"""

from __future__ import annotations

from typing import ClassVar

import torch

from vllm_d2cache.canvas.view import CanvasView, canvas_to_positions
from vllm_d2cache.options.request import RequestOptions
from vllm_d2cache.options.types import Choice, Number
from vllm_d2cache.policies.base import CachePolicy, StepOutcome, StepPlan

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

    @staticmethod
    def max_rows(options: RequestOptions, prompt_len: int, canvas_len: int, refresh_budget: int | None) -> int:
        """All positions for ``decode``; else the canvas and, in a shifted family, the position before it."""
        if options.value("dkv_variant") == DECODE:
            return prompt_len + canvas_len
        return min(prompt_len, 1) + canvas_len

    def next_plan(self, view: CanvasView, outcome: StepOutcome) -> StepPlan:
        """Masked positions, the last commits, and now and then all that may be refreshed."""
        variant = self.option("dkv_variant", view).unsqueeze(1)
        every = self.option("cache_steps", view)
        step = view.window_step
        due = (step % every == 0).unsqueeze(1)
        decode = variant == VARIANTS.index(DECODE)
        due |= decode & (step == 1).unsqueeze(1)

        canvas = self._with_source(view.in_canvas, view)
        changing = self._with_source(view.masked, view) | canvas_to_positions(outcome.committed, view)
        refreshable = torch.where(decode, view.in_text, canvas)
        always = torch.where(variant == VARIANTS.index(PREFILL), canvas, changing)
        return StepPlan(torch.where(due, refreshable, always))

    def _with_source(self, slots: torch.Tensor, view: CanvasView) -> torch.Tensor:
        """[R, T] bool: the positions of ``slots`` and those their logits are read from.

        The published code for shifted families leaves a masked position out as soon as its right neighbour is known,
        and keeps the K and V of a mask after it has become a token; here neither is left out.
        """
        return canvas_to_positions(slots, view) | self.read_from(slots, view)
