"""`vllm serve` of a family whose texts are cut into blocks: the API that the other families have."""

from __future__ import annotations

import json
from collections.abc import Iterator
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
        ({"vllm_xargs": {"d2cache_canvas": json.dumps([-1, 5, -1])}, "max_tokens": 3}, "d2cache_canvas"),
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


def test_the_log_says_what_is_done_with_prompts(blocks: Server) -> None:
    line = next(line for line in blocks.log.splitlines() if "vllm-d2cache batch:" in line)
    assert "prompts are computed in pieces of" in line
    assert "equal prefixes are found again" in line
