"""Graphs of refresh steps on a GPU: real ones, replayed on ragged batches, without a wait. No vLLM is needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from tests.triton.loop import PAGE, VOCAB, Loop
from vllm_d2cache.graphs.graph_check import CacheSize, check_graphs
from vllm_d2cache.graphs.step_graphs import StepBuffers, StepGraphs, graph_sizes
from vllm_d2cache.ops import dispatch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif("not torch.cuda.is_available()", reason="no GPU (test_step_graphs.py has an emulator)"),
]

TEXTS = [(400, 64), (30, 8), (700, 100), (128, 32)]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"policy": "full"},
    {"current_k": 16, "rollout_p": 0.05, "threshold": 0.5, "window": 16, "inflate_w": 0},
    {"current_k": 8, "tokens_per_step": 2},
]


def record(step: Callable[[], None]) -> Callable[[], None]:
    """cuda_graphs.CudaRecorder without vLLM's collectives."""
    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> Iterator[None]:
    monkeypatch.setitem(dispatch._chosen, device.type, "triton")
    return


@pytest.fixture
def graphed(device: torch.device) -> Loop:
    loop = Loop(device, OPTIONS, texts=TEXTS)
    buffers = StepBuffers(graph_sizes(512, 8)[-1], 4096, PAGE, device)
    loop.graphs = StepGraphs(graph_sizes(512, 8), buffers, loop.forward, record)
    loop.graphs.capture()
    return loop


def test_replays_decide_what_eager_steps_decide(graphed: Loop, device: torch.device) -> None:
    eager = Loop(device, OPTIONS, texts=TEXTS)
    for loop in (eager, graphed):
        loop.step(padded=False)
    for slots in ([0], [0, 1, 2, 3], [2, 0], [3], [1, 2], [3, 1]):
        for _ in range(4):
            want, got = eager.step(padded=False, slots=slots), graphed.step(slots=slots)
            assert torch.equal(got.committed, want.committed), slots
            assert torch.equal(got.tokens, want.tokens), slots
            assert torch.equal(graphed.steps.canvas.refresh, eager.steps.canvas.refresh), slots
    assert graphed.graph_steps == 24


def test_a_graph_step_never_waits(graphed: Loop) -> None:
    graphed.step(padded=False)
    graphed.step()
    before = graphed.graph_steps
    torch.cuda.set_sync_debug_mode("error")
    try:
        graphed.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert graphed.graph_steps == before + 1


def test_the_check_at_start_up_passes(graphed: Loop, device: torch.device) -> None:
    assert graphed.graphs is not None
    check_graphs(graphed.graphs, CacheSize(graphed.caches[0].shape[0], PAGE), VOCAB, device)
