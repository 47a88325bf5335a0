"""Texts in blocks: pieces of prompts, prefixes found again, memory by blocks and preemption give the same tokens."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import Engine
from tests.reference.blocks import BLOCK_ORACLE

pytestmark = [pytest.mark.vllm, pytest.mark.engine]

PAGE = 32
SAMPLED = {"temperature": 0.9, "top_p": 0.95, "top_k": 40}
# Few requests fit beside each other, and a prompt in pieces of 24 positions.
TIGHT = {"num_gpu_blocks_override": 17, "long_prefill_token_threshold": 24, "max_num_batched_tokens": 256}


def prompt_of(length: int, seed: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(360) for _ in range(length)]


def requests_of(family: str) -> list[dict[str, Any]]:
    """Prompts of all kinds of length, greedy and sampled, by all decoders of the family."""
    # The first three grow while the others come and go.
    sizes = [(5, 150), (40, 130), (20, 160), (1, 17), (31, 17), (33, 33), (203, 33), (350, 9)]
    made = [
        {"prompt": prompt_of(length, length), "max_tokens": tokens, "options": {"threshold": 0.2}}
        for length, tokens in sizes
    ]
    for n, request in enumerate(made):
        if n % 2:
            request["sampling"] = {**SAMPLED, "seed": n}
        if n % 4 == 3:
            request["options"] = {"threshold": 0, "steps": 3}
        elif n % 4 == 2 and family != "fast_dllm_v2":
            request["options"] = {"decoder": "edit", "threshold": 0.3, "editing_threshold": 0.2}
        if n in (0, 1, 4, 6):  # with rows of the open block left out; also beside edits
            request["options"] |= {"policy": "d2cache", "current_k": 3, "inflate_w": 0}
        elif n == 5:
            request["options"]["policy"] = "full"
    return made


def start(directory: Path, family: str, **settings: Any) -> Engine:
    return Engine(
        directory,
        **{"model": str(BLOCK_ORACLE / family), "block_size": PAGE, "additional_config": {}, "max_num_seqs": 8}
        | {"max_model_len": 512, "num_gpu_blocks_override": 200, **settings},
    )


Alone = tuple[str, list[dict[str, Any]], list[list[int]]]


@pytest.fixture(scope="module", params=["llada2", "fast_dllm_v2"])
def alone(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Alone]:
    """Requests and their tokens one by one, from whole prompts and without a prefix cache."""
    requests = requests_of(request.param)
    settings = {"enable_prefix_caching": False, "enable_chunked_prefill": False}
    engine = start(tmp_path_factory.mktemp("alone"), request.param, **settings)
    try:
        tokens = [engine.tokens([one])[0] for one in requests]
    finally:
        engine.close()
    assert len({tuple(found) for found in tokens}) == len(tokens)
    yield request.param, requests, tokens


def test_with_little_memory_and_short_pieces(tmp_path: Path, alone: Alone) -> None:
    family, requests, wanted = alone
    engine = start(tmp_path, family, **TIGHT)
    try:
        scheduler = engine.llm.llm_engine.engine_core.engine_core.scheduler
        preempted: list[str] = []
        original = scheduler._preempt_request
        scheduler._preempt_request = lambda r, *args, **kw: (preempted.append(r.request_id), original(r, *args, **kw))
        assert engine.tokens(requests) == wanted
        assert preempted  # or nothing has been tried
        assert engine.tokens(requests) == wanted  # with what is left in the prefix cache
    finally:
        engine.close()


def test_from_the_prefix_cache_and_after_it_is_dropped(tmp_path: Path, alone: Alone) -> None:
    family, requests, wanted = alone
    engine = start(tmp_path, family, async_scheduling=False)
    try:
        assert engine.tokens(requests) == wanted
        assert [engine.tokens([one])[0] for one in requests] == wanted
        core, step = engine.llm.llm_engine, engine.llm.llm_engine.step
        steps = 0

        def dropping() -> Any:
            nonlocal steps
            steps += 1
            if steps in (2, 5, 9):
                core.reset_prefix_cache(reset_running_requests=True)
            return step()

        core.step = dropping
        assert engine.tokens(requests) == wanted
        assert steps > 9
    finally:
        engine.close()


def test_a_repeated_prompt_costs_its_open_block(tmp_path: Path) -> None:
    """Of 993 prompt tokens, 992 are whole blocks and whole pages."""
    engine = start(tmp_path, "sdar", max_model_len=1024)
    request = {"prompt": prompt_of(993, 0), "max_tokens": 3, "options": {"threshold": 0, "steps": 4, "report": True}}
    try:
        rows = []
        for _ in range(2):
            (output,) = engine._generate([request])
            rows.append(output.kv_transfer_params["d2cache"]["rows_refreshed"])
        # Three tokens of a block of four, one in each of three steps.
        assert rows == [992 + 3 * 4, 3 * 4]
    finally:
        engine.close()
