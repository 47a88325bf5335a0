"""The interface of a decoder: of the candidates of a step it says which are committed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch

from vllm_d2cache.canvas.lines import Lines
from vllm_d2cache.canvas.request import Request
from vllm_d2cache.canvas.slot_options import SlotOptions
from vllm_d2cache.canvas.view import CanvasView
from vllm_d2cache.mechanisms.base import Finding, RequestSize, Use, Worker

# For decoders to import from here, as the rest of what they need.
from vllm_d2cache.ops.ranking import rank_candidates as rank_candidates
from vllm_d2cache.ops.ranking import take_best as take_best
from vllm_d2cache.ops.row_stats import RowParams, RowStats, TileReader
from vllm_d2cache.options.types import Choice, Number


@dataclass(frozen=True)
class PredictedRows:
    """The predicted rows of a step, before their statistics are taken; ``mine`` are those of one decoder.

    What is derived is derived when a decoder first reads it: most read nothing.
    """

    view: CanvasView
    predicted: torch.Tensor  # [R, G] bool, slots that have a row; the rows stand in row-major order
    request: torch.Tensor  # [n] int64, row of the batch
    canvas_slot: torch.Tensor  # [n] int64, G where the row is padding
    part: torch.Tensor | None  # [n] bool, the decoder's own rows; None = all are
    lines: torch.Tensor | None  # [m] int64, rows of the batch that are this decoder's; None = all are
    hidden: torch.Tensor  # [n, d] final hidden states
    lm_head: Callable[[torch.Tensor], torch.Tensor]  # [m, d] -> [m, vocab] logits
    params: RowParams
    mask_token_id: int
    member_slots: Sequence[int] = ()  # slots of ``lines``, on the host

    @cached_property
    def slots(self) -> torch.Tensor:
        """[n] int64: the request's slot."""
        return self.view.slots[self.request]

    @cached_property
    def in_window(self) -> torch.Tensor:
        """[n] bool: the canvas slot lies in the request's current window."""
        return self.view.in_window[self.request, self.canvas_slot.clamp(max=self.predicted.shape[1] - 1)]

    @cached_property
    def live(self) -> torch.Tensor:
        """[n] bool: the row is not padding."""
        return self.canvas_slot < self.predicted.shape[1]

    @cached_property
    def mine(self) -> torch.Tensor:
        """[n] bool: the row is of one of ``lines``."""
        return torch.ones_like(self.request, dtype=torch.bool) if self.part is None else self.part


@dataclass(frozen=True)
class DecoderStep(Lines):
    """What a decoder chooses from; R rows (requests), G canvas slots."""

    view: CanvasView  # before this step's commits
    candidates: torch.Tensor  # [R, G] bool, masked slots of the current window whose rows were computed
    token: torch.Tensor  # [R, G] int32, the predicted token; any value where there is no candidate
    score: torch.Tensor  # [R, G] float32, certainty prior included; any value where there is no candidate
    least: torch.Tensor  # [R] int64, commit at least this many, if there are as many candidates
    entropy: torch.Tensor | None  # [R, G] float32, nats; None where no decoder of the step reads it
    found: tuple[Finding, ...] = ()  # by the mechanisms of the step
    # For decoders that revise, None where no decoder of the step does: [R, G] bool, slots with a prediction, whether
    # masked or not; and [R, G] int32, the token that stands there.
    predicted: torch.Tensor | None = None
    standing: torch.Tensor | None = None


@dataclass(frozen=True)
class Commits:
    """What a step writes."""

    slots: torch.Tensor  # [R, G] bool, become tokens: a subset of the candidates, not empty where there are any
    token: torch.Tensor | None = None  # [R, G] int32, where another token than the predicted one is written
    revoked: torch.Tensor | None = None  # [R, G] bool, committed earlier and masked again, fewer than ``slots``
    # Of a decoder that revises: [R, G] bool, committed earlier and now another token, that of ``token`` or else the
    # predicted one; and [R] bool, whose window is not over.
    revised: torch.Tensor | None = None
    held: torch.Tensor | None = None


class Decoder(ABC):
    """Chooses the commits of each step for the requests that chose it.

    A decoder works on all its requests of a step at once and must not let one influence another. What it remembers is
    slot-indexed and overwritten in ``start``.
    """

    name: ClassVar[str]
    options: ClassVar[Mapping[str, Number | Choice]] = {}
    """What a request may set of this decoder alone, with defaults."""
    reads: ClassVar[tuple[str, ...]] = ()
    """Of the options ``threshold``, ``factor`` and ``score``, which not every decoder reads, those that it does."""
    commits_many: ClassVar[bool] = False
    """Whether its rule says how many tokens a step commits, with or without a threshold."""
    default_threshold: ClassVar[float] = 0.0
    """The threshold of requests that set neither threshold nor factor, for rules that cannot do without; 0 = none."""
    needs_server: ClassVar[tuple[str, ...]] = ()
    """Settings of the server without which it cannot be chosen."""
    ordered: ClassVar[type[Decoder] | None] = None
    """What takes its place where tokens are committed from left to right; None = it cannot be had there."""
    reads_entropy: ClassVar[bool] = False
    """Whether it needs the entropy of every predicted row."""
    observes_all: ClassVar[bool] = False
    """Whether it needs the statistics of all masked slots that are computed, not of the window's alone."""
    takes_padding: ClassVar[bool] = False
    """Whether its part of a step waits for nothing and minds no padding among the predicted rows (slot G)."""
    revokes: ClassVar[bool] = False
    """Whether it may take back what it committed in the current window: nothing of that window is emitted before."""
    revises: ClassVar[bool] = False
    """Whether it may write other tokens over those of the current window, all of which are then predicted, and says
    when the window is over (``Commits.held``): nothing of it is emitted before."""
    uses: ClassVar[tuple[Use, ...]] = ()
    """What it needs of the layers (mechanisms/)."""

    def __init__(self, worker: Worker) -> None:
        self._options = SlotOptions(self.options, worker.num_slots, worker.device)

    @classmethod
    def request_bytes(cls, size: RequestSize) -> int:
        """What it holds of a running request, beyond numbers for each slot."""
        return 0

    def start(self, slot: int, request: Request) -> None:
        """A request begins, or starts over, in ``slot``: nothing of the last tenant remains."""
        self._options.set(slot, request.options)

    def stop(self, slot: int) -> None:  # noqa: B027
        """The request in ``slot`` has ended."""

    def number(self, name: str, slots: torch.Tensor) -> torch.Tensor:
        """Option ``name`` of the requests in ``slots``: float32 of the same shape."""
        return self._options.columns[name][slots].float()

    def tile_reader(self, rows: PredictedRows) -> TileReader | None:
        """What looks at (and may change) the logits of this decoder's rows before their statistics are taken.

        Asked once in each step, so that a decoder may also look at the rows themselves.
        """
        return None

    def rescore(self, stats: RowStats, score: torch.Tensor, slots: torch.Tensor, who: torch.Tensor) -> torch.Tensor:
        """[n] float32: what ranks candidates, from the statistic ``score`` [n] that the request asks for.

        Args:
            slots: [R] int64 of the requests; row i is of request ``who`` [n].
        """
        return score

    @abstractmethod
    def choose(self, step: DecoderStep) -> Commits:
        """The commits of its requests."""
