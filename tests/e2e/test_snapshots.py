"""Provisional streaming: the whole canvas while it fills up, for clients that ask, over the real server."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from tests.e2e.server import TINY, Server

pytestmark = [pytest.mark.vllm, pytest.mark.engine]

CHAT: list[Any] = [{"role": "user", "content": "Reverse: abcdefgh"}]


@pytest.fixture
def http(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=300) as client:
        yield client


def events(http: httpx.Client, path: str = "/v1/completions", **fields: Any) -> list[tuple[str, Any]]:
    """The server-sent events of a stream: name ("" = unnamed), and JSON or text."""
    body = {"max_tokens": 24, "stream": True, **fields}
    with http.stream("POST", path, json=body) as response:
        assert response.status_code == 200, response.read()
        blocks = "\n".join(response.iter_lines()).strip().split("\n\n")
    found = []
    for block in blocks:
        parts = dict(line.split(": ", 1) for line in block.splitlines())
        assert set(parts) <= {"event", "data"}
        data = parts["data"]
        found.append((parts.get("event", ""), data if data == "[DONE]" else json.loads(data)))
    return found


def snapshots(found: list[tuple[str, Any]]) -> list[dict[str, Any]]:
    return [data["d2cache_snapshot"] for name, data in found if name == "d2cache.snapshot"]


def chunks(found: list[tuple[str, Any]]) -> list[Any]:
    return [data for name, data in found if not name]


def text_of(found: list[tuple[str, Any]]) -> str:
    return "".join(c["choices"][0]["text"] for c in chunks(found)[:-1])


def test_every_step_is_shown_and_the_text_is_the_same(http: httpx.Client) -> None:
    fields = {"prompt": "Reverse: stream", "ignore_eos": True, "return_token_ids": True}
    plain = events(http, **fields)
    assert not snapshots(plain)
    found = events(http, **fields, vllm_xargs={"d2cache_snapshots": 1})
    assert text_of(found) == text_of(plain)
    assert found[-1] == ("", "[DONE]")
    seen = snapshots(found)
    # One token a step; a snapshot that the client was too slow for is left out, the last one never is.
    steps = [s["step"] for s in seen]
    assert steps == sorted(set(steps))
    assert len(steps) > 12
    assert steps[-1] == 24
    for shot in seen:
        assert (len(shot["canvas"]), shot["index"]) == (24, 0)
        assert shot["canvas"].count(-1) == 24 - shot["step"]
        assert sum(p.get("masks", 0) for p in shot["pieces"]) == 24 - shot["step"]
    tokens = [t for c in chunks(found)[:-1] for t in c["choices"][0]["token_ids"]]
    assert seen[-1]["canvas"] == tokens
    assert any(-1 in s["canvas"][: 24 - s["canvas"].count(-1)] for s in seen), "never a token behind a mask"
    for earlier, later in itertools.pairwise(seen):
        assert all(a in (-1, b) for a, b in zip(earlier["canvas"], later["canvas"], strict=True))


def test_a_snapshot_comes_before_the_chunk_that_it_explains(http: httpx.Client) -> None:
    emitted, latest = 0, -1
    for name, data in events(
        http, prompt="abc", ignore_eos=True, return_token_ids=True, vllm_xargs={"d2cache_snapshots": 1}
    ):
        if name:
            canvas = data["d2cache_snapshot"]["canvas"]
            latest = canvas.index(-1) if -1 in canvas else len(canvas)
        elif data != "[DONE]":
            emitted += len(data["choices"][0]["token_ids"])
            assert emitted <= latest


def test_steps_between_snapshots(http: httpx.Client) -> None:
    found = events(http, prompt="abc", ignore_eos=True, vllm_xargs={"d2cache_snapshots": 10})
    steps = [s["step"] for s in snapshots(found)]
    assert set(steps) <= {10, 20, 24}
    assert steps[-1] == 24, "the last one is always sent"
    assert text_of(found) == text_of(events(http, prompt="abc", ignore_eos=True))


def test_the_official_client_reads_them_as_chunks_without_choices(server: Server) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=300)
    create = client.chat.completions.create
    stream = create(
        model=TINY, messages=CHAT, max_tokens=32, stream=True, extra_body={"vllm_xargs": {"d2cache_snapshots": 1}}
    )
    text, shots = "", []
    for chunk in stream:
        if chunk.choices:
            text += chunk.choices[0].delta.content or ""
        else:
            shots.append(chunk.model_extra["d2cache_snapshot"])
    assert text == "hgfedcba"
    assert shots
    assert "".join(p["text"] for p in shots[-1]["pieces"]) == "hgfedcba"
    assert len(shots[-1]["canvas"]) < 32, "what stands behind the end of text is not shown"
    plain = list(create(model=TINY, messages=CHAT, max_tokens=32, stream=True))
    assert all(chunk.choices for chunk in plain)


def test_each_choice_has_its_snapshots(http: httpx.Client) -> None:
    fields = {"prompt": "Tell me", "n": 3, "temperature": 2.0, "seed": 7, "ignore_eos": True, "return_token_ids": True}
    found = events(http, **fields, vllm_xargs={"d2cache_snapshots": 3})
    last = {s["index"]: s["canvas"] for s in snapshots(found)}
    tokens: dict[int, list[int]] = {0: [], 1: [], 2: []}
    for chunk in chunks(found)[:-1]:
        for choice in chunk["choices"]:
            tokens[choice["index"]] += choice["token_ids"]
    assert last == tokens


def test_a_stop_string_ends_the_stream(http: httpx.Client) -> None:
    found = events(
        http, "/v1/chat/completions", messages=CHAT, stop=["e"], vllm_xargs={"d2cache_snapshots": 1}, ignore_eos=True
    )
    pieces = [c["choices"][0] for c in chunks(found)[:-1]]
    assert "".join(p["delta"].get("content") or "" for p in pieces) == "hgf"
    assert pieces[-1]["finish_reason"] == "stop"
    assert found[-1] == ("", "[DONE]")
    assert snapshots(found)


def test_a_snapshot_can_be_given_as_a_canvas(http: httpx.Client) -> None:
    found = events(http, prompt="Reverse: stream", ignore_eos=True, vllm_xargs={"d2cache_snapshots": 8})
    half = snapshots(found)[0]["canvas"]
    assert -1 in half
    body = {"prompt": "Reverse: stream", "max_tokens": 24, "ignore_eos": True, "vllm_xargs": {"d2cache_canvas": half}}
    answer = http.post("/v1/completions", json={**body, "return_token_ids": True}).json()["choices"][0]["token_ids"]
    assert all(h in (-1, a) for h, a in zip(half, answer, strict=True))


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/v1/completions", {"prompt": "abc"}),
        ("/v1/chat/completions", {"messages": CHAT}),
        ("/v1/completions", {"prompt": ["abc", "abd"], "stream": True}),
        ("/v1/completions", {"prompt": "abc", "stream": True, "vllm_xargs": {"d2cache_snapshots": -1}}),
        ("/v1/chat/completions", {"messages": CHAT, "stream": True, "vllm_xargs": {"d2cache_snapshots": 0.5}}),
        ("/v1/responses", {"input": "abc"}),
        ("/v1/messages", {"messages": CHAT, "max_tokens": 16, "model": TINY}),
        # Other protocols rewrite the stream.
        ("/v1/responses", {"input": "abc", "stream": True}),
        ("/v1/messages", {"messages": CHAT, "max_tokens": 16, "model": TINY, "stream": True}),
    ],
)
def test_where_nobody_would_be_sent_them_they_are_refused(
    http: httpx.Client, path: str, fields: dict[str, Any]
) -> None:
    response = http.post(path, json={"vllm_xargs": {"d2cache_snapshots": 1}, **fields})
    assert response.status_code == 400, response.text
    assert "d2cache_snapshots" in response.text


def test_clients_that_hang_up_leave_nothing_behind(http: httpx.Client) -> None:
    body = {"prompt": "abc", "max_tokens": 256, "stream": True, "ignore_eos": True}
    for _ in range(4):
        with http.stream("POST", "/v1/completions", json={**body, "vllm_xargs": {"d2cache_snapshots": 1}}) as response:
            next(response.iter_lines())
    deadline = time.monotonic() + 60
    while True:
        (line,) = [x for x in http.get("/metrics").text.splitlines() if x.startswith("vllm:num_requests_running{")]
        if line.endswith(" 0.0"):
            break
        assert time.monotonic() < deadline, line
        time.sleep(0.2)
    assert text_of(events(http, prompt="Reverse: stream")) == text_of(
        events(http, prompt="Reverse: stream", vllm_xargs={"d2cache_snapshots": 1})
    )
