"""What users of other projects ran into, tried here: docs/inputs.md has where each was found."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from tests.e2e.server import Server

pytestmark = [pytest.mark.vllm, pytest.mark.engine]

# Of the vocabulary, but not of the tokenizer.
NAMELESS = [318, 319]


def chat(server: Server, text: str = "Reverse: stream", length: int = 32, **fields: Any) -> dict[str, Any]:
    """The answer to a chat of one message."""
    body = {"messages": [{"role": "user", "content": text}], "max_tokens": length, **fields}
    response = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=120)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def test_tokens_that_the_tokenizer_has_no_text_for(server: Server) -> None:
    """Vocabularies are padded; a hot model writes such a token, and its answer comes back as the next prompt."""
    fields: dict[str, Any] = {"allowed_token_ids": NAMELESS, "logprobs": True, "top_logprobs": 2, "temperature": 2.0}
    choice = chat(server, length=4, return_token_ids=True, **fields)["choices"][0]
    assert set(choice["token_ids"]) <= set(NAMELESS) and choice["message"]["content"] == ""
    assert len(choice["logprobs"]["content"]) == 4
    body = {"prompt": "a", "max_tokens": 4, "stream": True, "allowed_token_ids": NAMELESS}
    text = httpx.post(f"{server.url}/v1/completions", json=body, timeout=120).text
    assert '"error"' not in text and text.rstrip().endswith("[DONE]")
    again = {"prompt": choice["token_ids"], "max_tokens": 4}
    assert httpx.post(f"{server.url}/v1/completions", json=again, timeout=120).status_code == 200


def test_a_threshold_that_nothing_reaches_does_not_hang(server: Server) -> None:
    for options in ({}, {"d2cache_policy": "dual", "d2cache_window": 8}):
        fields = {"vllm_xargs": {**options, "d2cache_threshold": 1.0, "d2cache_report": 1}}
        answer = chat(server, ignore_eos=True, length=16, **fields)
        assert answer["usage"]["completion_tokens"] == 16
        assert answer["kv_transfer_params"]["d2cache"]["steps"] <= 16


def test_nothing_is_written_behind_the_end_of_a_text(server: Server) -> None:
    answer = chat(server, length=256, vllm_xargs={"d2cache_report": 1})
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["kv_transfer_params"]["d2cache"]["steps"] <= 2 * answer["usage"]["completion_tokens"]


def test_stop_strings_of_several_tokens_that_arrive_in_any_order(server: Server) -> None:
    whole = chat(server)["choices"][0]["message"]["content"]
    middle = whole[2:5]
    assert chat(server, stop=[middle])["choices"][0]["message"]["content"] == whole[:2]
    body = {"messages": [{"role": "user", "content": "Reverse: stream"}], "max_tokens": 32, "stop": [middle]}
    with httpx.stream("POST", f"{server.url}/v1/chat/completions", json={**body, "stream": True}, timeout=120) as lines:
        data = [json.loads(line[6:]) for line in lines.iter_lines() if line.startswith("data: {")]
    assert "".join(piece["choices"][0]["delta"].get("content") or "" for piece in data) == whole[:2]


def test_samplers_that_ask_for_nothing(server: Server) -> None:
    """As rollouts of reinforcement learning send them."""
    for fields in ({"top_k": 0, "top_p": 1.0, "temperature": 1.0}, {"top_k": -1, "temperature": 0, "top_p": 0.1}):
        assert chat(server, seed=5, **fields)["usage"]["completion_tokens"] > 0


def test_blocks_are_asked_of_a_model_without_any(server: Server) -> None:
    """Its text is one block then: all of it is computed in every step."""
    assert (
        chat(server, vllm_xargs={"d2cache_policy": "block"})["choices"]
        == chat(server, vllm_xargs={"d2cache_policy": "full"})["choices"]
    )
