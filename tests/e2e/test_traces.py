"""The engine reproduces the published implementation step by step."""

from __future__ import annotations

import pytest

from tests.e2e.conftest import Engine
from tests.reference.oracle import case_names, load_case

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
