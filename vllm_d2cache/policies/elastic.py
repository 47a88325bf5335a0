"""Elastic-Cache: the attention to the most attended tokens says whether the cache is still good.

docs/methods/other-caches.md, section 3. No code has been published; docs/policies.md has what had to be chosen, and how
it differs.
"""

from __future__ import annotations

from typing import ClassVar

import torch

from vllm_d2cache.canvas.view import CanvasView, canvas_to_positions
from vllm_d2cache.mechanisms.base import Worker
from vllm_d2cache.mechanisms.drift import Drift, ReadsDrift
from vllm_d2cache.options.types import Number
from vllm_d2cache.policies.base import CachePolicy, StepOutcome, StepPlan


class ElasticPolicy(CachePolicy):
    """Recomputes the ``elastic_beta`` leftmost masks, the last commits and each layer's most attended token.

    The masks' attention to that token is compared from step to step. Where its cosine similarity falls below
    ``elastic_gamma`` in some layer, the next step recomputes everything.
    """

    name = "elastic"
    options: ClassVar = {
        "elastic_beta": Number(int, 1, note="masked positions", default=16),
        "elastic_gamma": Number(float, 0, 1, note="cosine similarity", default=0.9),
    }
    defaults: ClassVar = {"window": 0, "sigma": 0.0}
    uses = (ReadsDrift(),)

    def __init__(self, worker: Worker) -> None:
        super().__init__(worker)
        # The step under way recomputes everything: its drift is that of the refresh, not of the text.
        self.renewed = torch.zeros(worker.num_slots, dtype=torch.bool, device=worker.device)

    def first_plan(self, view: CanvasView) -> StepPlan:
        """Everything."""
        self.renewed[view.slots] = True
        return StepPlan(view.in_text, candidates=self._leftmost(view))

    def next_plan(self, view: CanvasView, outcome: StepOutcome) -> StepPlan:
        """Everything after a drift, else the masks at the left and what has changed."""
        drift = outcome.of(Drift)
        gamma = self.option("elastic_gamma", view).float()  # as similarities are: 0.9 is not below 0.9
        drifted = (drift.similarity < gamma) & ~self.renewed[view.slots]
        renews = drifted | (gamma >= 1)
        self.renewed[view.slots] = renews
        masks = self._leftmost(view)
        partial = canvas_to_positions(masks | outcome.committed, view) | self.read_from(masks, view)
        partial = partial | drift.attended
        return StepPlan(torch.where(renews.unsqueeze(1), view.in_text, partial), candidates=masks)

    def _leftmost(self, view: CanvasView) -> torch.Tensor:
        """[R, G] bool: the masks that are recomputed in every step, and may be committed."""
        masks = view.masked & view.live & view.in_window
        return masks & (masks.cumsum(1) <= self.option("elastic_beta", view).unsqueeze(1))
