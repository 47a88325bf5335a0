"""32,768 positions on a CPU: memory is the limit, not ``max_num_batched_tokens``; closes its engines.

``pytest tests/e2e/test_long_context.py -m long -s`` prints the figures of docs/performance.md.
"""

from __future__ import annotations

import ctypes
import random
import re
import time
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import Engine, runner_of
from vllm_d2cache.engine.memory_plan import plan_memory
from vllm_d2cache.requests.resolve import server_options

pytestmark = [pytest.mark.vllm, pytest.mark.engine, pytest.mark.long]

MODEL = Path(__file__).parents[2] / "models/tiny-llada"
LENGTH, CANVAS = 32768, 8
SCALED = {"rope_scaling": {"rope_type": "linear", "factor": 8.0}}  # it was trained on 4,096 positions
# MiB: tiles, what the allocator keeps, Python's own. A tensor that grows with T x T would have 4 GiB.
SLACK = 48


def resident(field: str) -> int:
    """Bytes of this process: ``VmRSS`` now, ``VmHWM`` at most."""
    (kib,) = re.findall(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(kib) * 1024


def planned(config: Any, part: int) -> dict[str, int]:
    """MiB beside K and V, as docs/performance.md adds them up; numbers have four bytes."""
    shape, plan = config.model_config.hf_config.shape(), plan_memory(config, server_options(config))
    sizes = {
        "queries": plan.queries,
        "all rows": (part < LENGTH) * LENGTH * (2 * shape.hidden_size + 2 * shape.q_size) * 4,
        "a part": part * (5 * shape.hidden_size + 4 * shape.intermediate_size) * 4,
    }
    return {name: size >> 20 for name, size in sizes.items()}


@pytest.mark.parametrize("part", [2048, LENGTH])
def test_the_longest_request_in_the_planned_memory(part: int, tmp_path: Path) -> None:
    rng = random.Random(0)
    prompt = [rng.randrange(300) for _ in range(LENGTH - CANVAS)]
    settings = {"max_model_len": LENGTH, "max_num_batched_tokens": part, "max_num_seqs": 1, "additional_config": {}}
    # Large blocks go back to the system when they are freed (M_MMAP_THRESHOLD): else what vLLM's profile run has left
    # would be used again, unseen.
    assert ctypes.CDLL(None).mallopt(-3, 1 << 20) == 1
    engine = Engine(tmp_path, model=str(MODEL), hf_overrides=SCALED, **settings)
    try:
        engine.tokens([{"prompt": prompt[:20], "max_tokens": 4}])
        model, config = runner_of(engine).model, engine.llm.llm_engine.vllm_config
        assert model.part_rows == part
        before, begin = resident("VmRSS"), time.monotonic()  # the KV cache is resident from the start
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
        (tokens,) = engine.tokens([{"prompt": prompt, "max_tokens": CANVAS, "options": {"tokens_per_step": 4}}])
        added, plan = (resident("VmHWM") - before) >> 20, planned(config, part)
        seconds = time.monotonic() - begin
        print(f"parts of {part}: {added} MiB, planned {sum(plan.values())}: {plan}; {seconds:.0f} s for two steps")
        assert len(tokens) == CANVAS
        assert 0.9 * sum(plan.values()) <= added <= sum(plan.values()) + SLACK
    finally:
        engine.close()
