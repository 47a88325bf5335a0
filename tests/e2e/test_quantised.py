"""Quantised weights through vLLM's own layers; closes its engines like test_dream.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import Engine
from tests.reference.int8 import in_int8, write_int8
from tests.reference.oracle import ORACLE
from tests.reference.published import denoise
from tests.unit.test_oracle import MODELS, dense_model
from vllm_d2cache.options.server import ServerOptions
from vllm_d2cache.requests.resolve import resolve

pytestmark = [pytest.mark.vllm, pytest.mark.engine]

# Under full recompute: d2Cache's choices magnify a last-bit difference that crosses a rounding to 8 bits.
OPTIONS: list[dict[str, Any]] = [{"policy": "full"}, {"policy": "full", "window": 8}]


@pytest.mark.parametrize("family", MODELS)
def test_int8_weights_and_activations(family: str, tmp_path: Path) -> None:
    """The tokens are those of the same arithmetic in plain PyTorch."""
    checkpoint = write_int8(ORACLE / family, tmp_path / "model")
    prompt = list(range(20))
    engine = Engine(tmp_path, model=str(checkpoint), max_model_len=256)
    try:
        results = engine.run([{"prompt": prompt, "max_tokens": 16, "options": o} for o in OPTIONS])
    finally:
        engine.close()
    for options, (tokens, _) in zip(OPTIONS, results, strict=True):
        model = in_int8(dense_model(family))
        _, want = denoise(model, prompt, 16, resolve(ServerOptions({}), options))
        assert tokens == want, options
