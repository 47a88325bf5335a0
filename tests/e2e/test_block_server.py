"""`vllm serve` of a family whose texts are cut into blocks: the API that the other families have."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.server import TINY, Server, serve
from tests.reference.blocks import BLOCK_ORACLE

pytestmark = [pytest.mark.vllm, pytest.mark.engine]


@pytest.fixture(scope="module")
def blocks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Random weights of SDAR's shape, with the words of another tokenizer."""
    log = tmp_path_factory.mktemp("blocks") / "log"
    flags = ("--tokenizer", TINY, "--served-model-name", "blocks", "--dtype", "float32")
    with serve(log, *flags, model=str(BLOCK_ORACLE / "sdar")) as server:
        yield server


def complete(server: Server, **body: Any) -> httpx.Response:
    wishes = {"model": "blocks", "prompt": "Reverse: abcdefgh", "max_tokens": 22, "temperature": 0, **body}
    return httpx.post(f"{server.url}/v1/completions", json=wishes, timeout=120)


def test_an_answer_and_its_stream_are_the_same_text(blocks: Server) -> None:
    whole = complete(blocks, logprobs=2).json()["choices"][0]
    assert len(whole["logprobs"]["tokens"]) <= 22
    pieces = []
    for line in complete(blocks, stream=True).text.splitlines():
        if line.startswith("data: {"):
            pieces += [choice["text"] for choice in json.loads(line.removeprefix("data: "))["choices"]]
    assert "".join(pieces) == whole["text"]
    assert len(pieces) > 1


def test_max_tokens_says_when_to_stop_and_nothing_else(blocks: Server) -> None:
    short, long = (complete(blocks, max_tokens=n, ignore_eos=True, logprobs=0).json()["choices"][0] for n in (9, 22))
    tokens = long["logprobs"]["tokens"]
    assert (len(short["logprobs"]["tokens"]), len(tokens)) == (9, 22)
    assert tokens[:9] == short["logprobs"]["tokens"]


def test_an_answer_ends_where_it_is_asked_to_inside_a_block(blocks: Server) -> None:
    """By a stop string, a stop token, and not before min_tokens; a stream ends there, too."""
    body = {"max_tokens": 24, "ignore_eos": True, "return_token_ids": True}
    plain = complete(blocks, **body).json()["choices"][0]
    ids, text = plain["token_ids"], plain["text"]
    # The fewest that begin a stretch of text: what stands before is another text.
    place = next(n for n in range(5, 24) if ids[n] not in ids[:n] and n % 4 != 3)
    token = complete(blocks, **body, stop_token_ids=[ids[place]]).json()
    assert token["choices"][0]["token_ids"] == ids[: place + 1]
    assert token["choices"][0]["stop_reason"] == ids[place]
    assert token["usage"]["completion_tokens"] == place + 1
    later = complete(blocks, **body | {"ignore_eos": False}, stop_token_ids=[ids[place]], min_tokens=place + 4).json()
    assert ids[place] not in later["choices"][0]["token_ids"][: place + 4]
    letter = next(c for c in text if c.isascii() and text.index(c) > 2)
    cut = complete(blocks, **body, stop=letter).json()["choices"][0]
    assert (cut["text"], cut["finish_reason"], cut["stop_reason"]) == (text[: text.index(letter)], "stop", letter)
    events = [line for line in complete(blocks, **body, stop=letter, stream=True).text.splitlines() if "{" in line]
    pieces = [choice["text"] for event in events for choice in json.loads(event.removeprefix("data: "))["choices"]]
    assert "".join(pieces) == cut["text"]


def test_drawn_answers_are_the_same_alone_and_beside_others(blocks: Server) -> None:
    asked: list[dict[str, Any]] = [
        {
            "vllm_xargs": {f"d2cache_{name}": value for name, value in options.items()},
            "seed": n,
            "max_tokens": 5 + 3 * n,
        }
        for n, options in enumerate(({}, {"policy": "d2cache", "current_k": 1}, {"decoder": "edit"}, {"steps": 2}))
    ]
    asked += [{"seed": 9, "logit_bias": {"44": 5}}, {"seed": 9, "frequency_penalty": 1.5}, {"seed": 9, "top_k": 4}]

    def text(wishes: dict[str, Any]) -> str:
        answer = complete(blocks, temperature=1.0, ignore_eos=True, **wishes)
        return str(answer.json()["choices"][0]["text"])

    alone = [text(wishes) for wishes in asked]
    assert len(set(alone)) == len(alone)
    with ThreadPoolExecutor(len(asked)) as pool:
        assert list(pool.map(text, asked)) == alone


def test_streams_that_are_left_hold_nothing(blocks: Server) -> None:
    body = {"model": "blocks", "prompt": "abc", "max_tokens": 900, "ignore_eos": True, "stream": True}
    for _ in range(3):
        with httpx.stream("POST", f"{blocks.url}/v1/completions", json=body, timeout=60) as stream:
            next(stream.iter_lines())

    def held() -> float:
        lines = httpx.get(f"{blocks.url}/metrics", timeout=30).text.splitlines()
        names = ("vllm:num_requests_running", "vllm:num_requests_waiting{", "vllm:kv_cache_usage_perc")
        return sum(float(line.split()[-1]) for line in lines if line.startswith(names))

    deadline = time.monotonic() + 60
    while held():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_a_grammar_that_ends_ends_the_request(blocks: Server) -> None:
    answer = complete(blocks, max_tokens=60, structured_outputs={"choice": ["abc abc abc", "xyz xyz xyz"]}).json()
    assert answer["choices"][0]["text"] in ("abc abc abc", "xyz xyz xyz")
    assert answer["choices"][0]["finish_reason"] == "stop"


def test_answers_of_one_prompt_are_drawn_one_by_one(blocks: Server) -> None:
    wishes = {"n": 3, "temperature": 1.0, "seed": 5, "ignore_eos": True}
    texts = [choice["text"] for choice in complete(blocks, **wishes).json()["choices"]]
    assert len(set(texts)) == 3
    assert texts == [choice["text"] for choice in complete(blocks, **wishes).json()["choices"]]


@pytest.mark.parametrize(
    ("wishes", "field"),
    [
        ({"vllm_xargs": {"d2cache_policy": "dkv"}}, "d2cache_policy"),
        ({"vllm_xargs": {"d2cache_policy": "d2cache", "d2cache_rollout_p": 0.2}}, "d2cache_rollout_p"),
        ({"vllm_xargs": {"d2cache_window": 3}}, "d2cache_window"),
        ({"vllm_xargs": {"d2cache_canvas": [-1, 5, -1]}, "max_tokens": 3}, "d2cache_canvas: not with this model"),
        ({"vllm_xargs": {"d2cache_decoder": "wino"}}, "d2cache_decoder"),
    ],
)
def test_what_has_no_meaning_is_refused(blocks: Server, wishes: dict[str, Any], field: str) -> None:
    for stream in (False, True):
        answer = complete(blocks, stream=stream, **wishes)
        assert answer.status_code == 400
        assert field in answer.json()["error"]["message"]


def test_a_repeated_prompt_is_found_again(blocks: Server) -> None:
    """In vLLM's own metrics: all whole pages of 260 positions, whether these have 16 or 128."""

    def hits() -> float:
        lines = httpx.get(f"{blocks.url}/metrics", timeout=30).text.splitlines()
        return sum(float(li.split()[-1]) for li in lines if li.startswith("vllm:prefix_cache_hits_total"))

    prompt = list(range(40, 300))
    first = complete(blocks, prompt=prompt).json()["choices"][0]["text"]
    before = hits()
    assert complete(blocks, prompt=prompt).json()["choices"][0]["text"] == first
    assert hits() - before == 256


def test_the_example(blocks: Server) -> None:
    """A prompt of some 600 positions: once it is stored, what is computed is a page at most, and the answer."""
    example = Path(__file__).resolve().parents[2] / "examples" / "in_blocks.py"
    command = [sys.executable, str(example), f"{blocks.url}/v1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    rows = [int(count) for count in re.findall(r"steps, (\d+) rows:", done.stdout)]
    assert len(rows) == 4
    assert max(rows) < 128 + 32 * 2 * 4


def test_the_log_says_what_is_done_with_prompts(blocks: Server) -> None:
    line = next(line for line in blocks.log.splitlines() if "vllm-d2cache batch:" in line)
    assert "prompts are computed in pieces of" in line
    assert "equal prefixes are found again" in line
