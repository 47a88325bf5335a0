"""The interface of a cache policy: it says which positions are recomputed next, and never touches model tensors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from vllm_d2cache.canvas.lines import Lines
from vllm_d2cache.canvas.slot_options import SlotOptions
from vllm_d2cache.canvas.view import CanvasView, canvas_to_positions
from vllm_d2cache.mechanisms.base import FRESH, F, Finding, Use, Wish, Worker, finding
from vllm_d2cache.options.request import RequestOptions
from vllm_d2cache.options.types import Choice, Number


@dataclass(frozen=True)
class StepOutcome(Lines):
    """What a step found out and did."""

    committed: torch.Tensor  # [R, G] bool
    predicted: torch.Tensor  # [R, G] bool, slots whose row statistics exist
    score: torch.Tensor  # [R, G] float32, the ranking statistic without prior; only where predicted
    window_start: torch.Tensor  # [R] int64, the window in which this step committed
    first: torch.Tensor  # [R] bool, the request's first step
    entropy: torch.Tensor | None = None  # [R, G] float32, nats, 0 where not predicted; None where no policy reads it
    fresh: bool = True  # whether ``first`` may be True of some request
    found: tuple[Finding, ...] = ()  # by the mechanisms of the step

    def of(self, kind: type[F]) -> F:
        """The finding of that kind; there is one where some request of the step uses its mechanism."""
        return finding(self.found, kind)


@dataclass(frozen=True)
class StepPlan:
    """What a cache policy wants of the next step."""

    refresh: torch.Tensor  # [R, T] bool, positions whose K and V are recomputed
    # [R, G] bool, slots whose statistics the policy wants besides the window's; None = of no others.
    observe: torch.Tensor | None = None
    candidates: torch.Tensor | None = None  # [R, G] bool, slots that may be committed; None = all of the window
    wishes: tuple[Wish, ...] = ()  # one for each mechanism of the policy that takes any


class CachePolicy(ABC):
    """Decides the refresh set of each step for the requests that chose it.

    A policy works on all its requests of a step at once and must not let one influence another. What it remembers
    is slot-indexed and overwritten in ``first_plan``. Making one only allocates: the engine learns how much by making
    each on torch's meta device.
    """

    name: ClassVar[str]
    options: ClassVar[Mapping[str, Number | Choice]] = {}
    """What a request may set of this policy alone, with defaults."""
    defaults: ClassVar[Mapping[str, Any]] = {}
    """Published settings of decoding options; they apply where neither request nor server sets one."""
    own_defaults: ClassVar[Mapping[str, Any]] = {}
    """Of ``options``, other defaults than declared."""
    parallel_defaults: ClassVar[Mapping[str, Any]] = {}
    """Of ``options``, other defaults where a rule decides how many tokens a step commits."""
    takes_all_options: ClassVar[bool] = False
    """Whether a request may name other policies' options too; for the one that others are compared with."""
    reads_entropy: ClassVar[bool] = False
    """Whether the engine must compute the entropy of the predicted slots' distributions."""
    keeps_blocks: ClassVar[bool] = False
    """Whether it goes with families whose text is cut into blocks (FamilyTraits.block_length)."""
    in_blocks: ClassVar[type[CachePolicy] | None] = None
    """What it is with these, where that is another class: of the same name, and ``keeps_blocks``. Not inherited."""
    refreshes_all: ClassVar[bool] = False
    """Whether every step recomputes the whole text."""
    uses: ClassVar[tuple[Use, ...]] = ()
    """What it needs of the layers beyond fresh K and V (mechanisms/)."""

    def __init__(self, worker: Worker) -> None:
        self.traits = worker.traits
        self.logit_shift = worker.traits.logit_shift
        self.refresh_budget = worker.server.refresh_budget
        self._options = SlotOptions(self.options, worker.num_slots, worker.device)

    @classmethod
    def takes(cls) -> frozenset[str]:
        """What its refresh sets take from the layers, beside what its mechanisms do."""
        return frozenset() if cls.refreshes_all else frozenset({FRESH})

    @staticmethod
    def max_rows(options: RequestOptions, prompt_len: int, canvas_len: int, refresh_budget: int | None) -> int:
        """A bound on the rows of any step after the first; the scheduler reserves this many.

        All positions, for policies that now and then recompute everything: a refresh budget does not apply to them.
        """
        return prompt_len + canvas_len

    def start(self, slot: int, options: RequestOptions) -> None:
        """Take down the options of the request that gets ``slot``; ``first_plan`` follows."""
        self._options.set(slot, options)

    def option(self, name: str, view: CanvasView) -> torch.Tensor:
        """[R] one of ``options``: int64 for integers and for choices (index into their values), float64 otherwise."""
        return self._options.columns[name][view.slots]

    def read_from(self, slots: torch.Tensor, view: CanvasView) -> torch.Tensor:
        """[R, T] bool: the positions whose rows give the logits of canvas ``slots`` [R, G] bool.

        The one place where a policy meets the shift of a family that was made from a left-to-right model.
        """
        return canvas_to_positions(slots & view.in_canvas, view, self.logit_shift)

    def first_plan(self, view: CanvasView) -> StepPlan:
        """The plan of a request's first step: everything, as nothing is cached yet."""
        return StepPlan(view.in_text)

    @abstractmethod
    def next_plan(self, view: CanvasView, outcome: StepOutcome) -> StepPlan:
        """The plan of the next step, from the canvases after this step's commits and what the step found."""
