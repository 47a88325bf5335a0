"""The engine reproduces the published implementation step by step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.e2e.conftest import Engine, assert_golden_logits, assert_traces, runner_of
from vllm_d2cache.ops import dispatch, row_stats
from vllm_d2cache.ops.row_stats import KERNEL_ROWS_PER_TILE, ROWS_PER_TILE

pytestmark = [pytest.mark.vllm, pytest.mark.engine]


def test_all_traces_through_generate(engine: Engine) -> None:
    assert_traces(engine, "llada")


@pytest.mark.parametrize("row", range(3))
def test_published_logits_through_the_engine(engine: Engine, row: int) -> None:
    assert_golden_logits(engine, "llada", row)


def test_longest_request(engine: Engine) -> None:
    """Prompt and canvas fill max_model_len to the last position."""
    request = {"prompt": [i % 360 for i in range(4000)], "max_tokens": 96, "options": {"threshold": 0.01}}
    ((tokens, trace),) = engine.run([request])
    assert len(tokens) == 96
    assert trace[1]["refreshed"] is None
    assert trace[-2]["masked_left"] == 0


class LargestShapes(TorchDispatchMode):
    """Notes the shape of every tensor any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, tuple | list) else [out]:
            if isinstance(value, torch.Tensor):
                self.shapes.add(tuple(value.shape))
        return out


def test_rows_are_few_and_no_tensor_is_quadratic(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counts the rows of every step; no T x T matrix, no batch x T x vocabulary tensor, the first step included."""
    monkeypatch.setattr(row_stats, "TILE_LOGITS", 0)  # as of a large vocabulary
    prompt, canvas = 1500, 80
    length = prompt + canvas
    requests = [{"prompt": [(7 * i + j) % 360 for i in range(prompt)], "max_tokens": canvas} for j in range(2)]
    requests = [{**r, "options": {"threshold": 0.02}} for r in requests]
    model, head_rows = runner_of(engine).model, []
    stock = model.lm_logits

    def lm_logits(hidden: torch.Tensor) -> torch.Tensor:
        head_rows.append(hidden.shape[0])
        return stock(hidden)

    model.lm_logits = lm_logits
    try:
        with LargestShapes() as seen:
            results = engine.run(requests)
    finally:
        model.lm_logits = stock
    assert not [s for s in seen.shapes if sum(n >= length for n in s) >= 2]
    # The first step needs statistics of the whole canvas: more rows than one tile.
    assert sum(head_rows[:4]) >= canvas
    by_kernel = dispatch.chosen(runner_of(engine).device) != "torch"
    assert max(head_rows) <= (KERNEL_ROWS_PER_TILE if by_kernel else ROWS_PER_TILE)
    for _, trace in results:
        steps = trace[1:-1]
        assert steps[0]["refreshed"] is None
        # current_k + last commits (a window of 32) + a tenth by importance, times inflation between them.
        assert all(len(s["refreshed"]) < length / 2 for s in steps[1:])
