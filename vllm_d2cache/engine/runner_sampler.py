"""vLLM's sampler call, turned into row statistics, commits and the tokens to emit."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from vllm.v1.outputs import LogprobsTensors
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.sample.output import SamplerOutput

from vllm_d2cache.engine.memory_plan import Rehearsal
from vllm_d2cache.observe.snapshots import append_snapshots
from vllm_d2cache.observe.trace import TraceRecorder
from vllm_d2cache.ops.host import upload
from vllm_d2cache.step.runner import Step, StepRunner


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
        self.state = state
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
        state = self.state
        if state.step is None:
            state.rehearsal.sample()
            return _nothing(input_batch.num_reqs, logits.device)
        canvas = state.steps.canvas
        closed = state.steps.close(state.step, logits, state.model.lm_logits)
        rows, result = closed.rows, closed.result
        if state.tracer:
            state.tracer.step(rows, result, canvas, closed.stats.confidence)
        # The worker's computed count stays where the scheduler rolls it back to.
        budgets = [canvas.requests[s].row_budget for s in rows.slots]
        rejected = upload(budgets, torch.int32, logits.device)
        state.finish_step()
        logprobs = None if closed.logprobs is None else LogprobsTensors(*closed.logprobs)
        # Rows and commits of each request: compat/internals.py, take_step_report.
        counts = rows.refreshed
        if any(rows.extra):
            counts = counts + upload(rows.extra, torch.int64, logits.device)
        commits, revoked = result.changes
        if result.revoked is not None:
            commits = commits - revoked
        report = torch.stack([counts, commits], dim=1)
        if state.watched:
            report = append_snapshots(report, canvas, rows.slots, state.watched)
        return SamplerOutput(result.tokens, logprobs, report, result.num_tokens, rejected)


def _nothing(num_reqs: int, device: torch.device) -> SamplerOutput:
    """No tokens for any request."""
    zero = torch.zeros(num_reqs, dtype=torch.int32, device=device)
    return SamplerOutput(torch.zeros(num_reqs, 1, dtype=torch.int64, device=device), None, None, zero, zero)
