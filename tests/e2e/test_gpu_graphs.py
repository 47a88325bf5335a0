"""Graphs on and off give the same tokens in fp32. Two engines, one after the other, in a process of their own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.e2e.conftest import Engine, assert_same, mixed_requests

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.engine,
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]


def test_graphs_change_nothing(tmp_path: Path) -> None:
    requests = mixed_requests(32, seed=5)
    eager = Engine(tmp_path / "eager", enforce_eager=True)
    want = eager.run(requests)
    eager.close()
    graphs = Engine(tmp_path / "graphs", enforce_eager=False)
    try:
        if graphs.llm.llm_engine.vllm_config.model_config.enforce_eager:
            pytest.skip("this version has no CUDA graphs: its configuration hook keeps to eager execution")
        assert_same(graphs.run(requests), want)
    finally:
        graphs.close()
