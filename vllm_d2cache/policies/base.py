"""The interface of a cache policy: it says which positions are recomputed next, and never touches model tensors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from vllm_d2cache.canvas import canvas_to_positions
from vllm_d2cache.config import RequestOptions
from vllm_d2cache.option_types import Choice, Number
from vllm_d2cache.records import CanvasView, FamilyTraits, StepOutcome, StepPlan

# More than any text has positions, and far from overflow.
_LARGEST = 1 << 40


class CachePolicy(ABC):
    """Decides the refresh set of each step for the requests that chose it.

    A policy works on all its requests of a step at once and must not let one influence another. What it remembers
    is slot-indexed and overwritten in ``first_plan``. Making one only allocates: the
    engine learns how much by making each on torch's meta device.

    Args:
        num_slots: requests that can run at a time.
        max_len: most positions a request can have.
        logit_shift: how far left of a slot its logits are read (records.FamilyTraits).
        refresh_budget: rows a request may recompute in a step after its first; None = no limit.
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
    reads_drift: ClassVar[bool] = False
    """Whether the engine must measure how the attention of the rows that may be committed changes (records.Drift)."""
    hides_keys: ClassVar[bool] = False
    """Whether the plans say which positions are visible; without it, rows attend to all."""
    stores_outputs: ClassVar[bool] = False
    """Whether the engine must keep the outputs of layers for the canvas of this policy's requests."""
    drops_rows: ClassVar[bool] = False
    """Whether rows of this policy's requests leave the network behind some layers (records.RowExits)."""
    exit_layers: ClassVar[int] = 0
    """Of such a policy: behind how many layers rows may leave at most; hidden states are remembered there."""
    compares_proxies: ClassVar[bool] = False
    """Whether rows are compared by leading components of their values (records.StoredOutputs.proxy_rank)."""
    traits: FamilyTraits = FamilyTraits(mask_token_id=-1)
    """Of the model; the engine sets it before the first request."""

    def __init__(
        self, num_slots: int, max_len: int, device: torch.device, logit_shift: int, refresh_budget: int | None
    ) -> None:
        self.logit_shift = logit_shift
        self.refresh_budget = refresh_budget
        self._columns = {
            name: torch.zeros(num_slots, dtype=_column_type(spec), device=device) for name, spec in self.options.items()
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
