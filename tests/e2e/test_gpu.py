"""The engine on a GPU: that it is there, with the kernels, and that its memory is as planned."""

from __future__ import annotations

import pytest
import torch

from tests.e2e.conftest import Engine, runner_of
from vllm_d2cache.ops import dispatch

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.engine,
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]


def test_the_engine_runs_on_the_gpu_by_the_kernels(engine: Engine) -> None:
    runner = runner_of(engine)
    assert runner.device.type == "cuda"
    assert dispatch.chosen(runner.device) == "triton"
    assert next(runner.model.parameters()).is_cuda
    assert runner.model_state.steps.canvas.tokens.is_cuda


def test_the_plan_leaves_room_for_a_full_batch(engine: Engine) -> None:
    """As many requests as there are places, each in its first step at the same time, beside a full KV cache."""
    runner = runner_of(engine)
    places = runner.model_state.max_num_reqs
    requests = [{"prompt": [(i * j) % 360 for i in range(200)], "max_tokens": 16} for j in range(1, places + 1)]
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    engine.run(requests)
    plan = runner.model_state.rehearsal.plan
    taken = torch.cuda.max_memory_allocated() - before
    # Beside the forward pass itself: for the tiny model not a hundred MiB.
    assert taken <= plan.in_forward + plan.after_forward + (100 << 20)
