"""The engine reproduces the published implementation step by step."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.e2e.conftest import Engine, runner_of
from tests.reference.oracle import ORACLE, case_names, load_case
from vllm_d2cache.ops.row_stats import ROWS_PER_TILE

pytestmark = [pytest.mark.vllm, pytest.mark.engine]


def test_all_traces_through_generate(engine: Engine) -> None:
    cases = [load_case(name) for name in case_names()]
    requests = [{"prompt": c.prompt, "max_tokens": c.canvas_length, "options": c.options} for c in cases]
    for case, (tokens, trace) in zip(cases, engine.run(requests), strict=True):
        steps = [(line["refreshed"], [tuple(pair) for pair in line["committed"]]) for line in trace[1:-1]]
        for number, (got, want) in enumerate(zip(steps, case.steps, strict=True)):
            assert got == want, f"{case.name}, step {number}"
        assert tokens == case.final_tokens, case.name
        assert trace[-1] == {"output_token_ids": tokens, "finish_reason": "length"}


@pytest.mark.parametrize("row", range(3))
def test_published_logits_through_the_engine(engine: Engine, row: int) -> None:
    golden = np.load(ORACLE / "traces" / "golden_llada.npz")
    padding = int((golden["attention_mask"][row] == 0).sum())
    ids = golden["input_ids"][row, padding:].tolist()
    canvas = ids.index(370)  # the traces' mask token: the rest of the row is canvas
    model, hidden = runner_of(engine).model, []
    stock = model.forward

    def forward(*args: Any, **kwargs: Any) -> torch.Tensor:
        hidden.append(stock(*args, **kwargs))
        return hidden[-1]

    model.forward = forward
    try:
        engine.run([{"prompt": ids[:canvas], "max_tokens": len(ids) - canvas}])
    finally:
        model.forward = stock
    with torch.inference_mode():
        logits = model.lm_logits(hidden[0])
    want = torch.from_numpy(golden["logits_masked_batch"][row, padding:])
    torch.testing.assert_close(logits, want, rtol=0, atol=1e-4)


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


def test_rows_are_few_and_no_tensor_is_quadratic(engine: Engine) -> None:
    """Counts the rows of every step; no T x T matrix, no batch x T x vocabulary tensor, the first step included."""
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
    assert max(head_rows) <= ROWS_PER_TILE
    for _, trace in results:
        steps = trace[1:-1]
        assert steps[0]["refreshed"] is None
        # current_k + last commits (a window of 32) + a tenth by importance, times inflation between them.
        assert all(len(s["refreshed"]) < length / 2 for s in steps[1:])
