"""The engine on a GPU: that it is there, with the kernels, and that its later steps wait for nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

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
    assert runner.model_state.denoiser.canvas.tokens.is_cuda


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


@contextmanager
def no_waits(state: Any, slots_begun: Callable[[], bool]) -> Iterator[list[int]]:
    """From the plan of a step to its end, torch raises where the host would wait for the device."""
    checked: list[int] = []
    begin, end = state.preprocess_state, state.finish_step

    def strict_begin(*args: Any, **kwargs: Any) -> None:
        if slots_begun():
            torch.cuda.set_sync_debug_mode("error")
            checked.append(1)
        begin(*args, **kwargs)

    def strict_end() -> None:
        end()
        torch.cuda.set_sync_debug_mode("default")

    state.preprocess_state, state.finish_step = strict_begin, strict_end
    try:
        yield checked
    finally:
        torch.cuda.set_sync_debug_mode("default")
        del state.preprocess_state, state.finish_step


def test_later_steps_wait_for_nothing(engine: Engine) -> None:
    if engine.llm.llm_engine.vllm_config.model_config.enforce_eager:
        pytest.skip("this version runs eagerly: steps of exactly the rows that are needed wait once")
    requests = [{"prompt": list(range(40)), "max_tokens": 24}, {"prompt": list(range(9)), "max_tokens": 8}]
    want = engine.run(requests)
    state, steps = runner_of(engine).model_state, iter(range(10_000))
    with no_waits(state, lambda: next(steps) > 1) as checked:  # the first ones admit
        got = engine.run(requests)
    assert len(checked) > 10
    assert [tokens for tokens, _ in got] == [tokens for tokens, _ in want]
