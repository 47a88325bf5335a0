"""Two engines behind vLLM's own front end (`--data-parallel-size 2`); has a server of its own."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.e2e.server import serve

pytestmark = [pytest.mark.vllm, pytest.mark.engine, pytest.mark.long]

WORDS = ("abcdefgh", "qwertyui", "stream", "zyxwv")
# One API server: a process less to start.
FLAGS = ("--data-parallel-size", "2", "--api-server-count", "1", "--max-num-seqs", "4")


@pytest.mark.timeout(1000)
def test_requests_are_spread_over_two_engines_and_answered_alike(tmp_path: Path) -> None:
    with serve(tmp_path / "log", *FLAGS, patience=800) as server:

        def ask(word: str, rank: int | None = None) -> str:
            body = {"messages": [{"role": "user", "content": f"Reverse: {word}"}], "max_tokens": 32}
            headers = {} if rank is None else {"X-data-parallel-rank": str(rank)}
            answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, headers=headers, timeout=300)
            assert answer.status_code == 200, answer.text
            return str(answer.json()["choices"][0]["message"]["content"])

        alone = [ask(word, rank=0) for word in WORDS]
        assert alone[0] == "hgfedcba"
        assert [ask(word, rank=1) for word in WORDS] == alone
        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(ask, WORDS * 4)) == alone * 4
        bad = {"prompt": "a", "max_tokens": 8, "d2cache_policy": "full"}
        refused = httpx.post(f"{server.url}/v1/completions", json=bad, timeout=60)
        assert refused.status_code == 400 and "d2cache_policy" in refused.text
        metrics = httpx.get(f"{server.url}/metrics", timeout=60).text
    found = re.findall(r'^vllm_d2cache:canvases_total\{engine="(\d)".*\} (\S+)$', metrics, re.MULTILINE)
    canvases = {engine: float(count) for engine, count in found}
    assert canvases.keys() == {"0", "1"}, "each engine has its own figures"
    assert min(canvases.values()) > len(WORDS), "one engine had all that named none"
    assert sum(canvases.values()) == 6 * len(WORDS)
