"""The life of a step: the file to read first. No vLLM; whatever runs the network calls three methods in turn.

A scheduler says which requests have a step. ``open`` turns their plans into *rows*, ``place`` says where K and V of the
rows go. Then the caller runs the *layers*, which call the hooks of mechanisms. ``close`` takes *statistics* of what was
predicted, lets decoders *commit* and policies *plan* the next step, and says what to *emit*.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from vllm_d2cache.canvas.request import Request
from vllm_d2cache.canvas.rows import StepResult, StepRows
from vllm_d2cache.canvas.states import CanvasStates
from vllm_d2cache.mechanisms.base import Mechanisms, Worker
from vllm_d2cache.observe.counters import StepCounters
from vllm_d2cache.ops.columns import nobody
from vllm_d2cache.ops.host import Writes
from vllm_d2cache.ops.row_stats import RowStats
from vllm_d2cache.policies.base import StepOutcome
from vllm_d2cache.policies.budget import uses_of
from vllm_d2cache.step.constraints import Constraints
from vllm_d2cache.step.decoding import Decoding, LMHead
from vllm_d2cache.step.fills import begin_fills
from vllm_d2cache.step.form import StepForms
from vllm_d2cache.step.logprobs import EmittedLogprobs, LogprobRecorder
from vllm_d2cache.step.pages import Pages, place_rows
from vllm_d2cache.step.planning import Planning
from vllm_d2cache.step.rows import select_rows
from vllm_d2cache.step.step import Step


@dataclass(frozen=True)
class Closed:
    """What became of a step."""

    rows: StepRows  # without the slots whose rows have left
    stats: RowStats
    result: StepResult
    logprobs: EmittedLogprobs | None


class StepRunner:
    """Runs the steps of one worker: texts, decoders, policies and mechanisms of all its running requests.

    Args:
        may_graph: False while something reads steps on the host (traces).
    """

    def __init__(self, worker: Worker, may_graph: bool = True) -> None:
        self.worker = worker
        self.canvas = CanvasStates(worker.num_slots, worker.max_len, worker.device, worker.traits)
        self.constraints = Constraints(self.canvas)
        self.mechanisms = Mechanisms(worker, self.canvas)
        self.planning = Planning(worker, self.canvas, self.mechanisms)
        self.decoding = Decoding(worker, self.canvas, self.constraints)
        self.logprobs = LogprobRecorder(self.canvas)
        self.counters = StepCounters()
        parts = (self.canvas, self.mechanisms, self.decoding, self.constraints, self.logprobs)
        self.forms = StepForms(*parts, may_graph)

    def add(self, slot: int, request: Request, prompt: np.ndarray, emitted: int = 0) -> None:
        """Start a request in ``slot``, or start it over; see CanvasStates.add."""
        writes = Writes(self.worker.device)
        self.canvas.add(slot, request, prompt, emitted, writes)
        self.constraints.add(slot, request, writes)
        writes.send()
        self.mechanisms.enter(slot, uses_of(request.options))
        self.planning.start(slot)
        self.decoding.start(slot)
        self.logprobs.add(slot, request)

    def remove(self, slot: int) -> None:
        """Forget the request in ``slot``."""
        self.decoding.stop(slot)
        self.constraints.remove(slot)
        self.mechanisms.leave(slot)
        self.logprobs.remove(slot)
        self.canvas.remove(slot)

    def open(
        self,
        slots: torch.Tensor,
        slots_host: Sequence[int],
        padded: bool = False,
        reaches: Sequence[int] | None = None,
    ) -> Step:
        """The rows of a step of these requests: [R] int64 on the device, and the same on the host.

        They come from the plans that ``close`` of the last step has left in three tables of the canvas: what to
        refresh, what to observe, and what may be committed.

        Args:
            padded: give each request as many rows as it can need (step/rows.py), also where no graph wants it; only
                where ``forms.can_pad``.
            reaches: up to which position each may be computed, where texts are computed in pieces. One whose first
                step that leaves out is only filled (step/fills.py).
        """
        fills = None if reaches is None else begin_fills(self.canvas, slots_host, reaches)
        if fills is not None:
            slots_host = [slots_host[line] for line in fills.deciding]
            slots = slots[fills.order[: len(slots_host)]]
        if not slots_host:
            return Step(None, fills=fills)
        size = self.forms.padded_graph(slots_host) if fills is None else None
        asks = self.decoding.asks(slots_host)
        rows = select_rows(self.canvas, slots, slots_host, asks, padded or size is not None)
        if size is None and fills is None:
            size = self.forms.exact_graph(rows)
        self.canvas.see(slots_host)
        if size is not None:
            return Step(rows, (), size)
        hooks = self.mechanisms.open(rows)
        rows = rows.with_extra([hook.extra for hook in hooks if hook.extra is not None])
        return Step(rows, hooks, fills=fills)

    def place(self, step: Step, pages: Pages) -> Step:
        """Where K and V of the rows go, and what the layers are to leave behind."""
        rows = step.rows
        layout = step.layout = place_rows(rows, step.fills, pages, self.worker.traits.block_length)
        if step.size is not None:
            assert self.forms.graphs is not None and rows is not None
            uses = [self.mechanisms.uses(slot) for slot in rows.slots]
            step.graph = self.forms.graphs.step(step.size, rows, layout, uses)
            step.hooks = (step.graph,)
        for hook in step.hooks:
            hook.place(layout)
        return step

    def close(self, step: Step, hidden: torch.Tensor, lm_head: LMHead) -> Closed:
        """Statistics, commits, the next plans, and what is emitted.

        Args:
            hidden: [n + v, d] final hidden states of ``rows.logits_rows``.
        """
        rows, hidden = step.remaining(hidden)
        behind, count = hidden, rows.predicted_index[0].shape[0]
        if hidden.shape[0] > count:
            hidden, behind = hidden[:count], hidden[count:]
        ask = partial(self.decoding.probability, rows, lm_head)
        found = step.findings(behind, ask, rows.view.num_positions)
        want_entropy = self.planning.reads_entropy(rows.slots)
        parts = self.decoding.parts(rows)
        stats = self.decoding.row_stats(rows, parts, hidden, lm_head, want_entropy)

        predicted, commits = self.decoding.choose(rows, parts, stats, found)
        token = predicted.token if commits.token is None else commits.token
        changed = (commits.slots, token, commits.revoked, commits.revised, commits.held)
        view, changes = self.canvas.commit(rows.view, *changed)
        outcome = StepOutcome(
            commits.slots if commits.revised is None else commits.slots | commits.revised,
            rows.predicted,
            predicted.score,
            rows.view.window_start,
            rows.view.step == 0 if rows.fresh else nobody(len(rows.slots), self.worker.device),
            predicted.entropy if want_entropy else None,
            rows.fresh,
            found,
        )
        self.planning.next(view, outcome, rows.slots)
        provisional = self.decoding.asks(rows.slots).provisional
        tokens, num_tokens = self.canvas.emit(view, provisional, commits.held)
        result = StepResult(tokens, num_tokens, commits.slots, view.masked, commits.revoked, commits.revised, changes)
        self.counters.add(rows, step.hooks, changes[0])
        return Closed(rows, stats, result, self.logprobs.record(rows, result, hidden, lm_head))
