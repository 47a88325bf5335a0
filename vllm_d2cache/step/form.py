"""Which form a step has: a padded graph, for which nothing is waited for; a graph of exact rows; or eager.

Padding is free up to the card's ridge (graphs/ridge.py). Beyond it a step waits once, for its numbers of rows, and
computes no others. Eager are first steps, those of a mechanism that graphs do not record, and larger ones than any
graph.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from vllm_d2cache.canvas.rows import StepRows
from vllm_d2cache.canvas.states import CanvasStates
from vllm_d2cache.graphs.step_graphs import GraphSize, StepGraphs
from vllm_d2cache.mechanisms.base import Mechanisms
from vllm_d2cache.step.constraints import Constraints
from vllm_d2cache.step.decoding import Decoding
from vllm_d2cache.step.logprobs import LogprobRecorder


class StepForms:
    """Chooses by what the requests of a step need.

    Attributes:
        graphs: recorded steps; None = there are none.
        may_graph: False while something reads steps on the host (traces).
        free_rows: most rows of a padded graph: as many as cost no more than fewer.
    """

    def __init__(
        self,
        canvas: CanvasStates,
        mechanisms: Mechanisms,
        decoding: Decoding,
        constraints: Constraints,
        logprobs: LogprobRecorder,
        may_graph: bool,
    ) -> None:
        self.canvas, self.mechanisms, self.decoding = canvas, mechanisms, decoding
        self.constraints, self.logprobs = constraints, logprobs
        self.graphs: StepGraphs | None = None
        self.may_graph = may_graph
        self.free_rows = sys.maxsize

    def can_pad(self, slots: Sequence[int]) -> bool:
        """Whether a step of these requests can be padded: no first step, and nothing whose shapes the device decides.

        Most mechanisms need exact rows; so do logit edits, log-probabilities and some decoders.
        """
        return (
            self.canvas.unseen.isdisjoint(slots)
            and self.mechanisms.take_padding(slots)
            and self.decoding.asks(slots).takes_padding
            and not self.constraints.any_of(slots)
            and not self.logprobs.any_of(slots)
        )

    def padded_graph(self, slots: Sequence[int]) -> GraphSize | None:
        """The graph that does a step of these requests with as many rows as each can need; None = it is not one."""
        if self.graphs is None or not self.may_graph or not self.can_pad(slots):
            return None
        bounds = self.canvas.batch(slots).row_budgets
        return self._fitting(self.graphs, slots, bounds) if sum(bounds) <= self.free_rows else None

    def exact_graph(self, rows: StepRows) -> GraphSize | None:
        """The graph that does a step whose rows have been counted; None = eager."""
        if self.graphs is None or not self.may_graph:
            return None
        known = self.canvas.unseen.isdisjoint(rows.slots)
        return self._fitting(self.graphs, rows.slots, rows.counts) if known else None

    def _fitting(self, graphs: StepGraphs, slots: Sequence[int], counts: list[int]) -> GraphSize | None:
        lengths, uses = zip(*((self.canvas.requests[s].visible, self.mechanisms.uses(s)) for s in slots), strict=True)
        return graphs.fitting(counts, lengths, uses)
