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


def prompt_of(length: int, seed: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(360) for _ in range(length)]


def requests_of() -> list[dict[str, Any]]:
    """Prompts of all kinds of length, greedy and sampled."""
    lengths = [1, 3, 4, 31, 32, 33, 100, 203, 350]
    made = [
        {"prompt": prompt_of(length, length), "max_tokens": 5 + 7 * (length % 6), "options": {"threshold": 0.2}}
        for length in lengths
    ]
    for n, request in enumerate(made):
        if n % 2:
            request["sampling"] = {**SAMPLED, "seed": n}
        if n % 4 == 3:
            request["options"] = {"threshold": 0, "steps": 3}
    return made


def start(tmp_path: Path, family: str, **settings: Any) -> Engine:
    return Engine(
        tmp_path / family,
        **{"model": str(BLOCK_ORACLE / family), "block_size": PAGE, "additional_config": {}, "max_num_seqs": 8}
        | {"max_model_len": 512, "num_gpu_blocks_override": 200, **settings},
    )


@pytest.fixture(scope="module", params=["sdar", "fast_dllm_v2"])
def plain(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Engine]]:
    """Whole prompts, no prefix cache: what all others are held against."""
    path = tmp_path_factory.mktemp("plain")
    engine = start(path, request.param, enable_prefix_caching=False, enable_chunked_prefill=False)
    yield request.param, engine
    engine.close()


def test_engines_of_all_kinds_give_the_same_tokens(tmp_path: Path, plain: tuple[str, Engine]) -> None:
    family, engine = plain
    requests = requests_of()
    alone = [engine.tokens([request])[0] for request in requests]
    assert engine.tokens(requests) == alone
    engine.close()
    # Sampling and thresholds are followed, or nothing would be shown.
    assert len({tuple(tokens) for tokens in alone}) == len(alone)
    kinds: list[dict[str, Any]] = [
        {"long_prefill_token_threshold": 24, "max_num_batched_tokens": 128},
        {"async_scheduling": False},
        {"num_gpu_blocks_override": 18, "async_scheduling": False},
        {"num_gpu_blocks_override": 18},
    ]
    for kind in kinds:
        other = start(tmp_path, family, **kind)
        try:
            assert other.tokens(requests) == alone, kind
            # Again, from the prefix cache; and one by one.
            assert other.tokens(requests) == alone, kind
            assert [other.tokens([request])[0] for request in requests] == alone, kind
        finally:
            other.close()
