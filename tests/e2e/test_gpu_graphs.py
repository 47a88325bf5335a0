"""CUDA graphs: the same tokens as without, in fp32, and no step waits. Engines of their own: traces need exact rows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.e2e.conftest import Engine, mixed_requests, runner_of
from tests.reference.oracle import SERVER

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.engine,
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]

# Long enough for maps in steps after the first: those are the steps that graphs do.
LONG = [{"prompt": [(7 * i + j) % 360 for i in range(400 + 50 * j)], "max_tokens": 24} for j in range(6)]
REQUESTS = [*LONG, *mixed_requests(32, seed=5)]


def untraced(folder: Path, eager: bool) -> Engine:
    """Traces want exact rows, which graphs do not have."""
    return Engine(folder, enforce_eager=eager, additional_config={"d2cache": SERVER})


@pytest.fixture(scope="module")
def eager_tokens(tmp_path_factory: pytest.TempPathFactory) -> list[list[int]]:
    engine = untraced(tmp_path_factory.mktemp("eager"), eager=True)
    tokens = engine.tokens(REQUESTS)
    engine.close()
    return tokens


@pytest.fixture(scope="module")
def graphs(eager_tokens: list[list[int]], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    engine = untraced(tmp_path_factory.mktemp("graphs"), eager=False)
    try:
        if engine.llm.llm_engine.vllm_config.model_config.enforce_eager:
            pytest.skip("this version has no CUDA graphs: its configuration hook keeps to eager execution")
        yield engine
    finally:
        engine.close()


def test_graphs_change_nothing(graphs: Engine, eager_tokens: list[list[int]]) -> None:
    assert graphs.tokens(REQUESTS) == eager_tokens
    assert [graphs.tokens([r])[0] for r in REQUESTS] == eager_tokens


@contextmanager
def no_waits(state: Any, first_steps: int) -> Iterator[list[int]]:
    """From the plan of a step to its end, torch raises where the host would wait for the device."""
    begun: list[int] = []
    begin, end = state.preprocess_state, state.finish_step

    def strict_begin(*args: Any, **kwargs: Any) -> None:
        begun.append(1)
        if len(begun) > first_steps:
            torch.cuda.set_sync_debug_mode("error")
        begin(*args, **kwargs)

    def strict_end() -> None:
        end()
        torch.cuda.set_sync_debug_mode("default")

    state.preprocess_state, state.finish_step = strict_begin, strict_end
    try:
        yield begun
    finally:
        torch.cuda.set_sync_debug_mode("default")
        del state.preprocess_state, state.finish_step


def test_steps_by_graphs_wait_for_nothing(graphs: Engine, eager_tokens: list[list[int]]) -> None:
    with no_waits(runner_of(graphs).model_state, first_steps=1) as begun:
        assert graphs.tokens(LONG[:2]) == eager_tokens[:2]
    assert len(begun) >= 24
