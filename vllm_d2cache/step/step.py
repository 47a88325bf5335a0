"""A step under way: its rows, and what the requests of its batch have to do with them."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from operator import sub

import torch

from vllm_d2cache.canvas.rows import StepRows
from vllm_d2cache.graphs.step_graphs import GraphSize, GraphStep
from vllm_d2cache.mechanisms.base import Ask, Finding, Hook
from vllm_d2cache.ops.paged_attention import PagedLayout
from vllm_d2cache.step.fills import Fills


@dataclass
class Step:
    """A step under way."""

    rows: StepRows | None  # None: all of its requests are only filled
    hooks: tuple[Hook, ...] = ()  # of the mechanisms that its requests use; a graph in their place
    size: GraphSize | None = None  # the graph that does it; None = eager
    fills: Fills | None = None  # rows behind all others
    layout: PagedLayout | None = None  # once it is placed
    graph: GraphStep | None = None  # replayed in place of the forward pass

    @property
    def slots(self) -> list[int]:
        """Of its requests: those that decide, then those that are filled."""
        return [*(self.rows.slots if self.rows else ()), *(self.fills.slots if self.fills else ())]

    def slots_of_batch(self) -> list[int]:
        """The same in the order of the batch."""
        if self.fills is None:
            return self.slots
        return [slot for _, slot in sorted(zip(self.fills.deciding + self.fills.lines, self.slots, strict=True))]

    def of_batch(self, values: torch.Tensor, filled: torch.Tensor | int = 0) -> torch.Tensor:
        """``values`` of those that decide as those of the whole batch: lines of the others are ``filled``."""
        if self.fills is None:
            return values
        whole = values.new_zeros(len(self.fills.order), *values.shape[1:])
        deciding, others = self.fills.order.tensor_split([len(values)])
        whole[deciding], whole[others] = values, filled
        return whole

    def starts_of_batch(self, starts: list[int]) -> list[int]:
        """Where stretches of those that decide begin, and the end: the same with empty ones of the others."""
        if self.fills is None:
            return starts
        counts = dict(zip(self.fills.deciding, map(sub, starts[1:], starts), strict=True))
        return list(accumulate((counts.get(line, 0) for line in range(len(self.fills.order))), initial=0))

    def owners(self) -> list[tuple[int, int]]:
        """Slots, and how many rows in a row are theirs, as the rows are packed: of the text, behind it, of fills."""
        rows, fills = self.rows, self.fills
        found = [*zip(rows.slots * 2, rows.counts + rows.extra, strict=True)] if rows else []
        return found + ([*zip(fills.slots, fills.counts, strict=True)] if fills else [])

    @property
    def num_rows(self) -> int:
        """N, of all kinds."""
        return sum(part.positions.shape[0] for part in (self.rows, self.fills) if part is not None)

    def remaining(self, hidden: torch.Tensor) -> tuple[StepRows, torch.Tensor]:
        """Its rows and their final hidden states [n + v, d], without the slots whose rows have left on the way."""
        assert self.rows is not None
        rows = self.rows
        for hook in self.hooks:
            if (present := hook.present()) is not None:
                rows, stayed = rows.without(present, hook.most_predicted())
                hidden = hidden[stayed]
        return rows, hidden

    def findings(self, behind: torch.Tensor, ask: Ask, num_positions: int) -> tuple[Finding, ...]:
        """What its hooks have found out.

        Args:
            behind: [v, d] final hidden states of the rows behind the text, which they asked for.
        """
        for hook in self.hooks:
            if hook.extra is not None:
                hook.read(behind, ask)
        results = (hook.result(num_positions) for hook in self.hooks)
        return tuple(result for result in results if result is not None)

    def packed(self) -> tuple[torch.Tensor, torch.Tensor]:
        """[N] int64 positions and [N] int32 token ids of all rows."""
        parts = [part for part in (self.rows, self.fills) if part is not None]
        if len(parts) == 1:
            return parts[0].positions, parts[0].input_ids
        return torch.cat([p.positions for p in parts]), torch.cat([p.input_ids for p in parts])
