"""The interface of a cache policy: it says which positions are recomputed next, and never touches model tensors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from vllm_d2cache.canvas.states import canvas_to_positions
from vllm_d2cache.canvas.view import CanvasView, StepOutcome, StepPlan
from vllm_d2cache.mechanisms.base import Use, Worker
from vllm_d2cache.options.server import RequestOptions
from vllm_d2cache.options.types import Choice, Number

# More than any text has positions, and far from overflow.
_LARGEST = 1 << 40


class CachePolicy(ABC):
    """Decides the refresh set of each step for the requests that chose it.

    A policy works on all its requests of a step at once and must not let one influence another. What it remembers
    is slot-indexed and overwritten in ``first_plan``. Making one only allocates: the
    engine learns how much by making each on torch's meta device.

    """

    name: ClassVar[str]
    options: ClassVar[Mapping[str, Number | Choice]] = {}
    """What a request may set of this policy alone: a field of config.RequestOptions, or an option with a default."""
    defaults: ClassVar[Mapping[str, Any]] = {}
    """Published settings of decoding options; they apply where neither request nor server sets one."""
    takes_all_options: ClassVar[bool] = False
    """Whether a request may name other policies' options too; for the one that others are compared with."""
    reads_importance: ClassVar[bool] = False
    """Whether the engine must collect attention maps and compute the rollout for this policy's requests."""
    reads_entropy: ClassVar[bool] = False
    """Whether the engine must compute the entropy of the predicted slots' distributions."""
    uses: ClassVar[tuple[Use, ...]] = ()
    """What it needs of the layers beyond fresh K and V (mechanisms/)."""

    def __init__(self, worker: Worker) -> None:
        self.traits = worker.traits
        self.logit_shift = worker.traits.logit_shift
        self.refresh_budget = worker.refresh_budget
        self._columns = {
            name: torch.zeros(worker.num_slots, dtype=_column_type(spec), device=worker.device)
            for name, spec in self.options.items()
        }

    @staticmethod
    @abstractmethod
    def max_rows(options: RequestOptions, prompt_len: int, canvas_len: int, refresh_budget: int | None) -> int:
        """A bound on the rows of any step after the first; the scheduler reserves this many."""

    def start(self, slot: int, options: RequestOptions) -> None:
        """Take down the options of the request that gets ``slot``; ``first_plan`` follows."""
        for name, spec in self.options.items():
            value = options.value(name)
            number = spec.values.index(value) if isinstance(spec, Choice) else min(value, _LARGEST)
            self._columns[name][slot] = number

    def option(self, name: str, view: CanvasView) -> torch.Tensor:
        """[R] one of ``options``: int64 for integers and for choices (index into their values), float64 otherwise."""
        return self._columns[name][view.slots]

    def read_from(self, slots: torch.Tensor, view: CanvasView) -> torch.Tensor:
        """[R, T] bool: the positions whose rows give the logits of canvas ``slots`` [R, G] bool.

        The one place where a policy meets the shift of a family that was made from a left-to-right model.
        """
        return canvas_to_positions(slots & view.in_canvas, view, self.logit_shift)

    def first_plan(self, view: CanvasView) -> StepPlan:
        """The plan of a request's first step: everything, as nothing is cached yet."""
        return StepPlan(view.in_text, torch.zeros_like(view.masked))

    @abstractmethod
    def next_plan(self, view: CanvasView, outcome: StepOutcome) -> StepPlan:
        """The plan of the next step, from the canvases after this step's commits and what the step found."""


def _column_type(spec: Number | Choice) -> torch.dtype:
    return torch.float64 if isinstance(spec, Number) and spec.kind is float else torch.int64


def nothing(view: CanvasView) -> torch.Tensor:
    """[R, G] bool, no slot: the ``observe`` of a policy that reads no statistics of its own."""
    return torch.zeros_like(view.masked)
