"""One step, from the plans of the last one to the tokens that it emits, on whatever runs the network. No vLLM.

``open`` says which rows go through the network, ``place`` where their K and V go and what the layers leave behind,
``close`` what became of them. vLLM's hooks call them in turn (model_state.py, runner_sampler.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from vllm_d2cache.canvas.view import StepResult, StepRows
from vllm_d2cache.graphs.step_graphs import GraphSize, GraphStep, StepGraphs
from vllm_d2cache.mechanisms.importance import ImportanceCapture, MapPool
from vllm_d2cache.ops.paged_attention import PagedLayout
from vllm_d2cache.ops.row_stats import RowStats
from vllm_d2cache.policies import POLICY_CLASSES
from vllm_d2cache.step.denoiser import Denoiser
from vllm_d2cache.step.logprobs import EmittedLogprobs, LogprobRecorder


@dataclass(frozen=True)
class Pages:
    """Where the texts of the step's requests lie."""

    table: torch.Tensor  # [R, blocks] int, KV block ids
    block_size: int
    first_block: list[int]  # of each request, -1 where its blocks are not consecutive

    def slots(self, rows: StepRows) -> torch.Tensor:
        """[N - shadows] int64: flat KV slot of each row, -1 for padding. Shadows have no page."""
        block = rows.text_positions.div(self.block_size, rounding_mode="floor")
        within = rows.text_positions - block * self.block_size
        slots = self.table[rows.request, block].long() * self.block_size + within
        return torch.where(rows.live, slots, -1)


@dataclass
class Step:
    """A step under way."""

    rows: StepRows
    size: GraphSize | None = None  # the graph that does it; None = eager
    layout: PagedLayout | None = None
    leaves: ImportanceCapture | GraphStep | None = None  # what the forward pass leaves for the importance


@dataclass(frozen=True)
class Closed:
    """What became of a step."""

    rows: StepRows  # without the slots whose rows have left
    stats: RowStats
    result: StepResult
    logprobs: EmittedLogprobs | None


class StepRunner:
    """Runs the steps of one worker.

    Args:
        may_graph: False while something reads steps on the host (traces).
    """

    def __init__(self, denoiser: Denoiser, may_graph: bool = True) -> None:
        self.denoiser = denoiser
        self.logprobs = LogprobRecorder(denoiser.canvas)
        self.graphs: StepGraphs | None = None
        self._may_graph = may_graph
        self._pool = MapPool()

    def open(self, slots: torch.Tensor, slots_host: Sequence[int]) -> Step:
        """The rows of a step of these requests: [R] int64 on the device, and the same on the host."""
        size = self._fitting_graph(slots_host)
        return Step(self.denoiser.begin(slots, slots_host, padded=size is not None), size)

    def place(self, step: Step, pages: Pages) -> Step:
        """Where K and V of the rows go, and where the layers leave what the importance is made from."""
        rows, ranks = step.rows, self.denoiser.worker.tensor_parallel
        lengths = [r.prompt_len + r.canvas_len for r in self._requests(rows.slots)]
        layout = PagedLayout(rows.counts, lengths, pages.table, pages.first_block, pages.slots(rows))
        step.layout = layout
        if step.size is not None and self.graphs is not None:
            step.leaves = self.graphs.step(step.size, rows, layout)
        else:
            step.leaves = ImportanceCapture(layout, rows.reads_importance, rows.text_positions, self._pool, ranks)
        return step

    def close(self, step: Step, hidden: torch.Tensor, lm_head: Callable[[torch.Tensor], torch.Tensor]) -> Closed:
        """Statistics, commits, the next plans, and what is emitted.

        Args:
            hidden: [n + v, d] final hidden states of ``rows.logits_rows``.
        """
        rows = step.rows
        for present in (p for hook in rows.hooks if (p := hook.present()) is not None):
            rows, stayed = rows.without(present)
            hidden = hidden[stayed]
        assert step.leaves is not None
        stats = self.denoiser.row_stats(rows, hidden, lm_head)
        importance = step.leaves.importance(rows.view.num_positions)
        result = self.denoiser.finish(rows, stats, importance, rows.found())
        return Closed(rows, stats, result, self.logprobs.record(rows, result, hidden, lm_head))

    def _fitting_graph(self, slots: Sequence[int]) -> GraphSize | None:
        """The graph that does a step of these requests; None = eager, with exact rows."""
        if self.graphs is None or not self._may_graph or self.logprobs.any_of(slots):
            return None
        if not self.denoiser.can_pad(slots):
            return None
        requests = self._requests(slots)
        lengths = [r.prompt_len + r.canvas_len for r in requests]
        reads = [POLICY_CLASSES[r.options.policy].reads_importance for r in requests]
        return self.graphs.fitting([r.row_budget for r in requests], lengths, reads)

    def _requests(self, slots: Sequence[int]):
        return [self.denoiser.canvas.requests[s] for s in slots]
