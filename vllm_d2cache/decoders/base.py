"""The interface of a decoder: of the candidates of a step it says which are committed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from vllm_d2cache.canvas.view import CanvasView
from vllm_d2cache.ops.row_stats import RowParams, RowStats, TileReader
from vllm_d2cache.options.server import RequestOptions


@dataclass(frozen=True)
class DecoderResources:
    """What decoders are made from.

    Attributes:
        num_slots: requests that can run at a time.
        max_len: most positions a request can have.
        token_frequencies: [vocab] float32, share of each token in a corpus; None = the server has no table.
    """

    num_slots: int
    max_len: int
    device: torch.device
    token_frequencies: torch.Tensor | None = None


@dataclass(frozen=True)
class PredictedRows:
    """The predicted rows of a step, before their statistics are taken; ``mine`` are those of one decoder."""

    slots: torch.Tensor  # [n] int64, the request's slot
    canvas_slot: torch.Tensor  # [n] int64
    in_window: torch.Tensor  # [n] bool, the slot lies in the request's current window
    mine: torch.Tensor  # [n] bool
    hidden: torch.Tensor  # [n, d] final hidden states
    lm_head: Callable[[torch.Tensor], torch.Tensor]  # [m, d] -> [m, vocab] logits
    params: RowParams
    mask_token_id: int


@dataclass(frozen=True)
class DecoderStep:
    """What a decoder chooses from; R rows (requests), G canvas slots."""

    view: CanvasView  # before this step's commits
    candidates: torch.Tensor  # [R, G] bool, masked slots of the current window whose rows were computed
    score: torch.Tensor  # [R, G] float32, certainty prior included; any value where there is no candidate
    least: torch.Tensor  # [R] int64, commit at least this many, if there are as many candidates
    entropy: torch.Tensor | None  # [R, G] float32, nats; None where no decoder of the step reads it
    verified: torch.Tensor | None = None  # [R, G] bool, committed slots that shadows were asked about
    shadow_probability: torch.Tensor | None = None  # [R, G] float32, of the token there; only where verified

    def select(self, rows: torch.Tensor) -> DecoderStep:
        """The step of some rows only."""
        return replace(
            self,
            view=self.view.select(rows),
            candidates=self.candidates[rows],
            score=self.score[rows],
            least=self.least[rows],
            entropy=None if self.entropy is None else self.entropy[rows],
            verified=None if self.verified is None else self.verified[rows],
            shadow_probability=None if self.shadow_probability is None else self.shadow_probability[rows],
        )


class Decoder(ABC):
    """Chooses the commits of each step for the requests that chose it.

    A decoder works on all its requests of a step at once and must not let one influence another. What it remembers is
    slot-indexed and overwritten in ``start``.
    """

    name: ClassVar[str]
    reads_entropy: ClassVar[bool] = False
    """Whether it needs the entropy of every predicted row."""
    observes_all: ClassVar[bool] = False
    """Whether it needs the statistics of all masked slots that are computed, not of the window's alone."""
    takes_padding: ClassVar[bool] = False
    """Whether its part of a step waits for nothing and minds no padding among the predicted rows (slot G)."""
    verifies: ClassVar[bool] = False
    """Whether committed slots of the window are asked about and may be taken back."""
    keeps_hidden: ClassVar[bool] = False
    """Whether it keeps the final hidden state of each canvas slot."""
    option_names: ClassVar[tuple[str, ...]] = ()
    """Numbers of RequestOptions that it reads by slot, as ``self.number(name, slots)``."""

    def __init__(self, resources: DecoderResources) -> None:
        self._numbers = torch.zeros(len(self.option_names), resources.num_slots, device=resources.device)

    def start(self, slot: int, options: RequestOptions, canvas_len: int) -> None:
        """A request begins, or starts over, in ``slot``: nothing of the last tenant remains."""
        values = [float(getattr(options, name)) for name in self.option_names]
        self._numbers[:, slot] = torch.tensor(values)

    def stop(self, slot: int) -> None:  # noqa: B027
        """The request in ``slot`` has ended."""

    def number(self, name: str, slots: torch.Tensor) -> torch.Tensor:
        """Option ``name`` of the requests in ``slots``: float32 of the same shape."""
        return self._numbers[self.option_names.index(name)][slots]

    def tile_reader(self, rows: PredictedRows) -> TileReader | None:
        """What looks at (and may change) the logits of this decoder's rows before their statistics are taken."""
        return None

    def rescore(self, stats: RowStats, score: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        """[n] float32: what ranks candidates, from the statistic ``score`` [n] that the request asks for."""
        return score

    @abstractmethod
    def choose(self, step: DecoderStep) -> torch.Tensor:
        """[R, G] bool: slots to commit, a subset of the candidates and not empty where there are any."""

    def revoke(self, step: DecoderStep, committed: torch.Tensor) -> torch.Tensor:
        """[R, G] bool: verified slots to mask again, fewer than ``committed`` [R, G]. Asked where ``verifies``."""
        raise NotImplementedError(f"decoder {self.name} does not verify")


def rank_candidates(score: torch.Tensor, candidates: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Candidates from the best down; ties go to the lower slot.

    Returns:
        Scores in that order [R, G], -inf behind the candidates; their slots [R, G]; which of both are candidates.
    """
    ordered, index = score.masked_fill(~candidates, -torch.inf).sort(dim=1, descending=True, stable=True)
    rank = torch.arange(score.shape[1], device=score.device).unsqueeze(0)
    return ordered, index, rank < candidates.sum(1, keepdim=True)


def take_best(index: torch.Tensor, candidates: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """[R, G] bool: the first ``count`` [R] slots of the ranking ``index``, of the candidates at most all."""
    rank = torch.arange(index.shape[1], device=index.device).unsqueeze(0)
    count = torch.minimum(count, candidates.sum(1))
    return torch.zeros_like(candidates).scatter_(1, index, rank < count.unsqueeze(1))
