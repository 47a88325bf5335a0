"""Two engines behind vLLM's own front end (`--data-parallel-size 2`); has a server of its own."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.e2e.server import serve

pytestmark = [pytest.mark.vllm, pytest.mark.engine]

WORDS = ("abcdefgh", "qwertyui", "stream", "zyxwv")


@pytest.mark.timeout(1000)
def test_requests_are_spread_over_two_engines_and_answered_as_by_one(tmp_path: Path) -> None:
    with serve(tmp_path / "log", "--data-parallel-size", "2", "--max-num-seqs", "4", patience=800) as server:

        def ask(word: str) -> str:
            body = {"messages": [{"role": "user", "content": f"Reverse: {word}"}], "max_tokens": 32}
            answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=300)
            assert answer.status_code == 200, answer.text
            return str(answer.json()["choices"][0]["message"]["content"])

        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(ask, WORDS * 4))
        assert answers == [word[::-1] for word in WORDS] * 4
        bad = httpx.post(
            f"{server.url}/v1/completions", json={"prompt": "a", "max_tokens": 8, "d2cache_policy": "full"}
        )
        assert bad.status_code == 400
        metrics = httpx.get(f"{server.url}/metrics", timeout=60).text
    canvases = {
        engine: float(count)
        for engine, count in re.findall(
            r'^vllm_d2cache:canvases_total\{engine="(\d)".*\} (\S+)$', metrics, re.MULTILINE
        )
    }
    assert canvases.keys() == {"0", "1"}, "each engine has its own figures"
    assert all(canvases.values()) and sum(canvases.values()) == len(answers)
