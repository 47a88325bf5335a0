"""The interface of a cache policy: it says which positions are recomputed next, and never touches model tensors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch

from vllm_d2cache.config import RequestOptions
from vllm_d2cache.records import CanvasView, StepOutcome, StepPlan


class CachePolicy(ABC):
    """Decides the refresh set of each step for the requests that chose it.

    A policy works on all its requests of a step at once and must not let one influence another. What it remembers
    is slot-indexed and overwritten in ``first_plan``.

    Args:
        num_slots: requests that can run at a time.
        max_len: most positions a request can have.
        logit_shift: how far left of a slot its logits are read (records.FamilyTraits).
        refresh_budget: rows a request may recompute in a step after its first; None = no limit.
    """

    name: ClassVar[str]
    reads_importance: ClassVar[bool] = False
    """Whether the engine must collect attention maps and compute the rollout for this policy's requests."""

    def __init__(
        self, num_slots: int, max_len: int, device: torch.device, logit_shift: int, refresh_budget: int | None
    ) -> None:
        self.logit_shift = logit_shift
        self.refresh_budget = refresh_budget

    @staticmethod
    @abstractmethod
    def max_rows(options: RequestOptions, prompt_len: int, canvas_len: int, refresh_budget: int | None) -> int:
        """A bound on the rows of any step after the first; the scheduler reserves this many."""

    def first_plan(self, view: CanvasView) -> StepPlan:
        """The plan of a request's first step: everything, as nothing is cached yet."""
        return StepPlan(view.in_text, torch.zeros_like(view.masked))

    @abstractmethod
    def next_plan(self, view: CanvasView, outcome: StepOutcome) -> StepPlan:
        """The plan of the next step, from the canvases after this step's commits and what the step found."""
