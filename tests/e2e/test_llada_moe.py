"""LLaDA-MoE through the engine, on a random checkpoint; closes its engine like test_dream.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.conftest import Engine
from tests.reference.llada_moe import DenseLladaMoe, write_random
from tests.reference.published import denoise
from tests.unit.policies.test_published import random_case
from vllm_d2cache.options.server import ServerOptions
from vllm_d2cache.requests.resolve import resolve

pytestmark = [pytest.mark.vllm, pytest.mark.engine]


def test_engine_follows_the_specification(tmp_path: Path) -> None:
    checkpoint = write_random(tmp_path / "model")
    cases = [random_case(seed) for seed in range(100, 112)]
    engine = Engine(tmp_path, model=str(checkpoint), max_model_len=512)
    try:
        results = engine.run([{"prompt": p, "max_tokens": g, "options": o} for p, g, o in cases])
    finally:
        engine.close()
    for (prompt, canvas, options), (tokens, trace) in zip(cases, results, strict=True):
        steps = [(line["refreshed"], [tuple(pair) for pair in line["committed"]]) for line in trace[1:-1]]
        wanted, final = denoise(DenseLladaMoe(checkpoint), prompt, canvas, resolve(ServerOptions({}), options))
        assert steps == wanted, options
        assert tokens == final, options
