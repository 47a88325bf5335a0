"""Other engine settings give the same results. The last to use the shared engine: one process holds one at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import Engine, assert_same

pytestmark = [pytest.mark.vllm, pytest.mark.engine]


@pytest.fixture(scope="module", autouse=True)
def _shared_engine_closed(engine: Engine, alone: list[Any]) -> None:
    """Take the shared engine's results, then make room."""
    engine.close()


@pytest.mark.parametrize(
    "settings",
    [
        {"num_gpu_blocks_override": 5},
        {"max_num_batched_tokens": 4096, "max_num_seqs": 3},
        {"block_size": 32},
        {"max_num_batched_tokens": 40},
    ],
    ids=["five-kv-blocks", "three-places", "small-pages", "parts-of-40-rows"],
)
def test_scarce_memory_changes_nothing(
    settings: dict[str, Any], requests: list[Any], alone: list[Any], tmp_path: Path
) -> None:
    other = Engine(tmp_path, max_model_len=512, **settings)
    try:
        assert_same(other.run(requests), alone)
    finally:
        other.close()


def test_asynchronous_scheduling_changes_nothing(
    requests: list[Any], alone: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.platforms.cpu import CpuPlatform

    stock = CpuPlatform.check_and_update_config.__func__

    def keep_async(cls: type, vllm_config: Any) -> None:
        stock(cls, vllm_config)
        vllm_config.scheduler_config.async_scheduling = True  # the CPU platform switches it off

    monkeypatch.setattr(CpuPlatform, "check_and_update_config", classmethod(keep_async))
    other = Engine(tmp_path)
    try:
        assert other.llm.llm_engine.vllm_config.scheduler_config.async_scheduling
        assert_same(other.run(requests), alone)
    finally:
        other.close()


@pytest.mark.parametrize("rows", [None, 40])
def test_the_compiled_network_changes_nothing(
    rows: int | None, requests: list[Any], alone: list[Any], tmp_path: Path
) -> None:
    """Compiled once, at start-up, for any number of rows; passes of stored outputs and in parts go layer by layer."""
    from torch._dynamo.utils import counters

    counters.clear()
    other = Engine(tmp_path, max_model_len=512, compilation_config={"mode": 3}, max_num_batched_tokens=rows)
    try:
        network = counters["stats"]["calls_captured"]
        # Parts go layer by layer from vLLM's profile run on, and the small operations below are met then.
        assert counters["stats"]["unique_graphs"] == 1 or rows is not None
        assert network > 100
        # Fused operations round elsewhere: tokens, not every step.
        assert other.tokens(requests) == [tokens for tokens, _ in alone]
        # vLLM may compile single small operations of those layers, but nothing of the network again.
        assert counters["stats"]["calls_captured"] - network < network / 10
        assert not counters["graph_break"]
    finally:
        other.close()
