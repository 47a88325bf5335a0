"""Which form a step has: padded, so that a graph can do it and nothing is waited for, or with exact rows."""

from __future__ import annotations

from collections.abc import Sequence

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

    def can_pad(self, slots: Sequence[int]) -> bool:
        """Whether a step of these requests can be padded: no first step, and nothing whose shapes the device decides.

        Most mechanisms need exact rows; so do logit edits, log-probabilities and some decoders.
        """
        requests = [self.canvas.requests[s] for s in slots]
        return (
            all(request.computed == request.length for request in requests)
            and all(use.takes_padding for slot in slots for use in self.mechanisms.uses(slot))
            and self.decoding.takes_padding(slots)
            and not self.constraints.any_of(slots)
            and not self.logprobs.any_of(slots)
        )

    def fitting_graph(self, slots: Sequence[int]) -> GraphSize | None:
        """The graph that does a step of these requests; None = eager, with exact rows."""
        if self.graphs is None or not self.may_graph or not self.can_pad(slots):
            return None
        requests = [self.canvas.requests[s] for s in slots]
        uses = [self.mechanisms.uses(slot) for slot in slots]
        return self.graphs.fitting([r.most_rows for r in requests], [r.visible for r in requests], uses)
