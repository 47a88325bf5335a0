"""The rows that go through the network in a step, and what the engine is told behind it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from vllm_d2cache.canvas.view import CanvasView


class ExtraRows(NamedTuple):
    """Rows behind those of the text: no page holds their K and V, and no row of the text attends to them."""

    counts: list[int]  # of each request, 0 for most
    positions: torch.Tensor  # [S] int64, request by request
    input_ids: torch.Tensor  # [S] int32
    logits_rows: torch.Tensor  # [v] int64 into all rows of the step, whose final hidden states are wanted besides


@dataclass(frozen=True)
class StepRows:
    """The rows of a step: ragged, request by request, ascending positions; behind them extra rows, if there are any.

    In a padded step a request has as many rows as it may need at most, known without a word from the device; its last
    ones are padding, and likewise its last predicted slots. N counts all rows, S those behind the text.
    """

    view: CanvasView
    slots: list[int]  # of the requests, on the host
    prompt_lens: list[int]  # likewise
    lengths: list[int]  # T of each request, likewise
    visible: list[int]  # of these, how many positions have memory and can be seen
    counts: list[int]  # rows of each request, padding included
    refreshed: torch.Tensor  # [R] int64, rows of each request without padding and extra rows
    num_predicted: torch.Tensor  # [R] int64, predicted slots of each
    full: list[bool]  # every position of the request is refreshed; False where padding hides it
    positions: torch.Tensor  # [N] int64, absolute
    input_ids: torch.Tensor  # [N] int32
    request: torch.Tensor  # [N - S] int64, row of the batch each belongs to
    live: torch.Tensor  # [N - S] bool, not a padding row
    row_of: torch.Tensor  # [R, T] int64, row of each refreshed position
    candidates: torch.Tensor  # [R, G] bool, slots that may be committed
    predicted: torch.Tensor  # [R, G] bool, slots whose statistics are taken
    # [n] request and [n] slot of each predicted slot, row-major; slot G, which is none, where there is padding.
    predicted_index: tuple[torch.Tensor, torch.Tensor]
    place: torch.Tensor  # [R, G] int64, which of the n each predicted slot is
    logits_rows: torch.Tensor  # [n + v] int64 into N, one for each predicted slot, then those of the extra rows
    extra: list[int]  # of each request: rows behind the text
    fresh: bool = True  # whether this may be the first step of some request
    exact: bool = False  # no row is padding, nor a predicted slot; a mechanism may make padding of these

    @property
    def text_positions(self) -> torch.Tensor:
        """[N - S] int64: ``positions`` without those of extra rows."""
        count = self.request.shape[0]
        return self.positions if count == self.positions.shape[0] else self.positions[:count]

    def by_request(self) -> list[torch.Tensor]:
        """The positions of each request's rows."""
        return list(self.text_positions.split(self.counts))

    def by_slot(self, values: torch.Tensor) -> torch.Tensor:
        """[n] numbers of the predicted slots as [R, G] over all slots, 0 elsewhere."""
        table = values.new_zeros(self.predicted.shape[0], self.predicted.shape[1] + 1)
        # Padding lands in a column that is cut off.
        table[self.predicted_index] = values
        return table[:, :-1]

    def with_extra(self, behind: Sequence[ExtraRows]) -> StepRows:
        """The same with rows behind the text; of one mechanism at most, as nobody attends to those of another."""
        if not behind:
            return self
        if len(behind) > 1:
            raise RuntimeError("two mechanisms of a step put rows behind its text; one can")
        added = behind[0]
        return replace(
            self,
            positions=torch.cat([self.positions, added.positions]),
            input_ids=torch.cat([self.input_ids, added.input_ids]),
            logits_rows=torch.cat([self.logits_rows, added.logits_rows]),
            extra=added.counts,
        )

    def without(self, present: torch.Tensor, most: int | None = None) -> tuple[StepRows, torch.Tensor]:
        """The same once it is known which rows have left: a slot that is read from such a row has no logits.

        Args:
            present: [N - S] bool. Rows of requests with extra rows do not leave.
            most: that so many predicted slots are left, or fewer: the rest becomes padding, behind all others. None =
                nobody on the host knows, and it waits for the device.

        Returns:
            And [m] int64, which of ``logits_rows`` are left.
        """
        (who, slot), count = self.predicted_index, len(self.predicted_index[0])
        there = present[self.logits_rows[:count]] & (slot < self.predicted.shape[1])
        asked = (there.nonzero() if most is None else there.nonzero_static(size=most)).flatten()
        live, asked = asked >= 0, asked.clamp(min=0)
        stayed = torch.cat([asked, torch.arange(count, len(self.logits_rows), device=asked.device)])
        slot = torch.where(live, slot[asked], self.predicted.shape[1])
        rows = replace(self, predicted_index=(who[asked], slot), logits_rows=self.logits_rows[stayed])
        predicted = rows.by_slot(live)
        place = predicted.flatten().cumsum(0).view(predicted.shape) - 1
        candidates, number = self.candidates & predicted, predicted.sum(1)
        rows = replace(rows, candidates=candidates, predicted=predicted, num_predicted=number, place=place)
        return rows, stayed


@dataclass(frozen=True)
class StepResult:
    """What the engine is told after a step."""

    tokens: torch.Tensor  # [R, G] int64, newly contiguous tokens, left-aligned
    num_tokens: torch.Tensor  # [R] int32, how many of them
    committed: torch.Tensor  # [R, G] bool
    masked: torch.Tensor  # [R, G] bool, after the commits
    revoked: torch.Tensor | None  # [R, G] bool, committed earlier and masked again; None where nothing can be
    revised: torch.Tensor | None  # [R, G] bool, committed earlier and another token now; likewise
    changes: tuple[torch.Tensor, torch.Tensor]  # [R] int64 each: how many committed, and how many revoked

    @property
    def written(self) -> torch.Tensor:
        """[R, G] bool: slots with a new token."""
        return self.committed if self.revised is None else self.committed | self.revised
