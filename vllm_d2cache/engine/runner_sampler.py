"""vLLM's sampler call, turned into row statistics, commits and the tokens to emit."""

from __future__ import annotations

import weakref
from typing import Any, Protocol

import torch
from vllm.v1.outputs import LogprobsTensors
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.sample.output import SamplerOutput

from vllm_d2cache.engine.memory_plan import Rehearsal
from vllm_d2cache.observe.snapshots import append_snapshots
from vllm_d2cache.observe.trace import TraceRecorder
from vllm_d2cache.ops.columns import first_columns
from vllm_d2cache.ops.host import upload
from vllm_d2cache.step.runner import StepRunner
from vllm_d2cache.step.step import Step

# Columns of the tokens handed out are a multiple: vLLM's kernel that reads them is one where their number is 1, one for
# multiples of 16 and one for others. As it is, the one that vLLM's own warm-up compiles serves all steps.
_WIDTH = 16


class StepHolder(Protocol):
    """What the sampler uses of the model state."""

    steps: StepRunner
    step: Step | None
    tracer: TraceRecorder | None
    rehearsal: Rehearsal
    watched: set[int]
    model: Any

    def finish_step(self) -> None:
        """The step is over."""


class _NoPenalties:
    """What vLLM's runner reads from a sampler's penalty state: no counts to update."""

    output_bin_counts = None


class D2CacheSampler:
    """Stands in for vLLM's Sampler; the model hands it hidden states in place of logits.

    Args:
        state: whose step this ends.
        base: vLLM's own sampler; its per-request tables are not used.
    """

    penalties_state = _NoPenalties()
    compute_nans = False

    def __init__(self, state: StepHolder, base: Any) -> None:
        # vLLM lets go of a state when it shuts down, and not of its sampler.
        self._state = weakref.ref(state)
        self.sampling_states = base.sampling_states

    def add_request(self, req_idx: int, sampling_params: Any) -> None:
        """The model state has the request already."""

    def apply_staged_writes(self) -> None:
        """Nothing is staged."""

    def __call__(self, logits: torch.Tensor, input_batch: InputBatch) -> SamplerOutput:
        """End the step.

        Args:
            logits: [n, d] hidden states of the predicted slots; in a dummy run [R, vocab] logits.
        """
        state = self._state()
        assert state is not None
        if state.step is None:
            state.rehearsal.sample()
            return _nothing(input_batch.num_reqs, logits.device)
        step, canvas = state.step, state.steps.canvas
        if step.rows is None:
            state.finish_step()
            nothing = _nothing(input_batch.num_reqs, logits.device)
            nothing.num_nans = _report(step, [], state)
            return nothing
        closed = state.steps.close(step, logits, state.model.lm_logits)
        rows, result = closed.rows, closed.result
        if state.tracer:
            state.tracer.step(rows, result, canvas, closed.stats.confidence)
        # The worker's computed count stays where the scheduler rolls it back to.
        rejected = canvas.row_budget.index_select(0, rows.view.slots)
        logprobs = closed.logprobs
        if logprobs is not None:
            logprobs = LogprobsTensors(*logprobs[:3], step.starts_of_batch(logprobs.starts))
        # Rows and commits of each request: compat/internals.py, take_step_report.
        counts = rows.refreshed
        if any(rows.extra):
            counts = counts + upload(rows.extra, torch.int64, logits.device)
        commits, revoked = result.changes
        if result.revoked is not None:
            commits = commits - revoked
        report = _report(step, [counts, commits], state)
        # vLLM copies all columns to the host, and turns them into Python's numbers.
        tokens = _in_width(result.tokens, canvas.batch(rows.slots).most_emitted)
        state.finish_step()
        of_all = (step.of_batch(values) for values in (result.num_tokens, rejected))
        return SamplerOutput(step.of_batch(tokens), logprobs, report, *of_all)


def _report(step: Step, columns: list[torch.Tensor], state: StepHolder) -> torch.Tensor:
    """[R, 2 + c] int64: rows and commits of each request of the batch, and canvases of those who watch.

    For one that is filled it is no step: its commits are -1.

    Args:
        columns: [R] int64 each, of those that decide.
    """
    device, slots = state.steps.worker.device, step.slots_of_batch()
    watched, fills = state.watched, step.fills
    if fills is None:
        report = torch.stack(columns, dim=1)
    else:
        filled = [[count, -1] for count in fills.counts]
        there = upload([n for pair in filled for n in pair], torch.int64, device).view(-1, 2)
        report = step.of_batch(torch.stack(columns, dim=1) if columns else there[:0], there)
        watched = watched - {*fills.slots}
    return append_snapshots(report, state.steps.canvas, slots, watched) if watched else report


def _in_width(tokens: torch.Tensor, most: int) -> torch.Tensor:
    """[R, w] int64: the first ``most`` columns of [R, G], and what else there is up to a multiple of _WIDTH."""
    width = -(-most // _WIDTH) * _WIDTH
    if tokens.shape[1] < width:
        return torch.nn.functional.pad(tokens, (0, width - tokens.shape[1]))
    return first_columns(tokens, width).contiguous()


def _nothing(num_reqs: int, device: torch.device) -> SamplerOutput:
    """No tokens for any request."""
    zero = torch.zeros(num_reqs, dtype=torch.int32, device=device)
    return SamplerOutput(torch.zeros(num_reqs, _WIDTH, dtype=torch.int64, device=device), None, None, zero, zero)
