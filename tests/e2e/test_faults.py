"""Requests that break servers, against the real one; it must answer or refuse each, and stay well."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.e2e.conftest import Engine, mixed_requests
from tests.e2e.server import TINY, Server

pytestmark = [pytest.mark.vllm, pytest.mark.engine]

MASK = 309
CHAT = {"messages": [{"role": "user", "content": "Reverse: abcdefgh"}], "max_tokens": 32}


@pytest.fixture
def http(server: Server) -> Iterator[httpx.Client]:
    """A client; after each test the server must still answer a plain question rightly."""
    with httpx.Client(base_url=server.url, timeout=300) as client:
        yield client
        answer = client.post("/v1/chat/completions", json=CHAT)
        assert answer.json()["choices"][0]["message"]["content"] == "hgfedcba"


def complete(http: httpx.Client, **fields: Any) -> dict[str, Any]:
    """A completion that must succeed."""
    response = http.post("/v1/completions", json={"max_tokens": 8, **fields})
    assert response.status_code == 200, response.text
    return response.json()


def refused(http: httpx.Client, path: str = "/v1/completions", **request: Any) -> str:
    """The message of a request that must be refused, and not by a server error."""
    response = http.post(path, **request)
    assert 400 <= response.status_code < 500, (response.status_code, response.text)
    return response.text


def test_no_prompt(http: httpx.Client) -> None:
    assert "prompt" in refused(http, json={"prompt": [], "max_tokens": 8}).lower()
    assert "prompt" in refused(http, json={"max_tokens": 8}).lower()


def test_a_canvas_of_one_token(http: httpx.Client) -> None:
    usage = complete(http, prompt="abc", max_tokens=1, ignore_eos=True)["usage"]
    assert usage["completion_tokens"] == 1


def test_all_of_max_model_len(http: httpx.Client) -> None:
    length = http.get("/v1/models").json()["data"][0]["max_model_len"]
    prompt = [7] * (length - 8)
    usage = complete(http, prompt=prompt, ignore_eos=True)["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (length - 8, 8)
    # vLLM 0.31 refuses this itself, in its own words.
    assert re.search("max_tokens|requested 9 output tokens", refused(http, json={"prompt": prompt, "max_tokens": 9}))


def test_a_prompt_of_mask_tokens(http: httpx.Client) -> None:
    usage = complete(http, prompt=[MASK] * 50, ignore_eos=True)["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (50, 8)


def test_a_prompt_of_100000_characters(http: httpx.Client) -> None:
    assert "context length" in refused(http, json={"prompt": "x" * 100_000, "max_tokens": 8})


def test_token_ids_outside_the_vocabulary(http: httpx.Client) -> None:
    assert "vocab" in refused(http, json={"prompt": [5, 10**6], "max_tokens": 8}).lower()
    refused(http, json={"prompt": [5, -1], "max_tokens": 8})


BODIES = {
    "not UTF-8": b'{"prompt": "\xff\xfe", "max_tokens": 8}',
    "half a character": b'{"prompt": "\\ud800", "max_tokens": 8}',
    "no JSON": b"{",
    "no object": b"[]",
    "deep": b'{"prompt": ' + b"[" * 5000 + b"]" * 5000 + b"}",
}


@pytest.mark.parametrize("name", BODIES)
def test_bodies_that_are_no_request(http: httpx.Client, name: str) -> None:
    refused(http, content=BODIES[name], headers={"Content-Type": "application/json"})


EXTREMES: list[dict[str, Any]] = [
    {"d2cache_sigma": 1e308, "d2cache_selection_sigma": 1e308},
    {"d2cache_sigma": 1e-308, "d2cache_selection_sigma": 5e-324},
    {"d2cache_factor": 1e308},
    {"d2cache_factor": 1e-308},
    {"d2cache_threshold": 5e-324},
    {"d2cache_rollout_p": 5e-324},
    {"d2cache_confidence_top_p": 5e-324},
    {"d2cache_window": 2**63 - 1, "d2cache_inflate_w": 2**63 - 1},
    {"d2cache_tokens_per_step": 2**63 - 1, "d2cache_current_k": 2**63 - 1},
]


@pytest.mark.parametrize("options", EXTREMES, ids=lambda o: ",".join(f"{k[8:]}={v:.0e}" for k, v in o.items()))
def test_options_at_the_ends_of_their_ranges(http: httpx.Client, options: dict[str, Any]) -> None:
    usage = complete(http, prompt="abc", ignore_eos=True, vllm_xargs=options)["usage"]
    assert usage["completion_tokens"] == 8


def test_integers_that_no_machine_word_holds(http: httpx.Client) -> None:
    assert "extra_args" in refused(http, json={"prompt": "a", "max_tokens": 8, "vllm_xargs": {"d2cache_window": 2**70}})


def test_numbers_that_are_none(http: httpx.Client) -> None:
    for value in ("NaN", "Infinity", "-Infinity", "1e999"):
        body = f'{{"prompt": "a", "max_tokens": 8, "vllm_xargs": {{"d2cache_sigma": {value}}}}}'
        refused(http, content=body, headers={"Content-Type": "application/json"})


def test_too_many_stop_tokens(http: httpx.Client) -> None:
    message = refused(http, json={"prompt": "a", "max_tokens": 8, "stop_token_ids": list(range(300))})
    assert "stop_token_ids: at most 128" in message


SECRET = "qwxzkvj"
ASK = {"messages": CHAT["messages"], "max_tokens": 8}
# Routes that stream, and the least that a request must have there.
STREAMS: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "a", "max_tokens": 8},
    "/v1/chat/completions": ASK,
    "/v1/responses": {"input": "a", "max_output_tokens": 8},
    "/v1/messages": {"model": TINY, **ASK},
}
# What is refused -> the name in the message, and the routes that have no such field.
STREAMED_REFUSALS: list[tuple[dict[str, Any], str, tuple[str, ...]]] = [
    ({"vllm_xargs": {"d2cache_policy": SECRET}}, "d2cache_policy", ()),
    ({"vllm_xargs": {f"d2cache_{SECRET}": 1}}, f"d2cache_{SECRET}", ()),
    ({"top_k": -5}, "top_k", ()),
    ({"no_such_field": SECRET}, "no_such_field", ()),
    ({"stop_token_ids": list(range(200))}, "stop_token_ids", ("/v1/messages",)),
    ({"logit_bias": {"999999": 1.0}}, "logit_bias", ("/v1/messages",)),
    ({"structured_outputs": {"regex": f"({SECRET}"}}, "regex", ("/v1/messages",)),
    ({"structured_outputs": {"grammar": "root ::= root"}}, "structured_outputs", ("/v1/messages",)),
]


@pytest.mark.parametrize(
    ("path", "fields", "name"),
    [(path, f, name) for f, name, without in STREAMED_REFUSALS for path in STREAMS if path not in without],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_a_stream_is_refused_before_it_begins(
    http: httpx.Client, server: Server, path: str, fields: dict[str, Any], name: str
) -> None:
    with http.stream("POST", path, json={**STREAMS[path], **fields, "stream": True}) as stream:
        body = stream.read().decode()
    assert (stream.status_code, stream.headers["content-type"]) == (400, "application/json"), body
    assert name in json.loads(body)["error"]["message"]
    assert SECRET not in server.log.replace(f"d2cache_{SECRET}", "")
    assert "Traceback" not in server.log


@pytest.mark.parametrize("path", STREAMS)
def test_a_stream_that_is_fine_ends_well(http: httpx.Client, path: str) -> None:
    with http.stream("POST", path, json={**STREAMS[path], "stream": True}) as stream:
        body = stream.read().decode()
    assert stream.status_code == 200, body
    assert stream.headers["content-type"].startswith("text/event-stream")
    assert "error" not in body
    assert any(end in body for end in ("[DONE]", "response.completed", "response.incomplete", "message_stop"))


def test_nothing_of_a_prompt_or_an_answer_is_logged(http: httpx.Client, server: Server) -> None:
    secret = "qwxzkvj"
    body = {"messages": [{"role": "user", "content": f"Reverse: {secret}"}], "max_tokens": 32}
    answer = http.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"]
    assert len(answer) > 3
    refused(http, "/v1/chat/completions", json={**body, "max_tokens": 0})
    refused(http, "/v1/chat/completions", json={**body, "vllm_xargs": {"d2cache_policy": secret}})
    watching = {**body, "stream": True, "vllm_xargs": {"d2cache_snapshots": 1}}
    with http.stream("POST", "/v1/chat/completions", json=watching) as stream:
        assert "d2cache.snapshot" in stream.read().decode()
    with http.stream("POST", "/v1/chat/completions", json={**body, "stream": True}) as stream:
        next(stream.iter_lines())  # and hang up
    assert secret not in server.log
    assert answer not in server.log


def test_request_ids_of_clients(http: httpx.Client) -> None:
    for chosen in ("../../../tmp/evil", "x" * 4000, "{{DATA}}", "%00"):
        response = http.post("/v1/chat/completions", json=CHAT, headers={"X-Request-Id": chosen})
        assert response.status_code == 200


# --- in process ----------------------------------------------------------------------------------------------------


def test_slots_and_kv_blocks_are_given_back(engine: Engine) -> None:
    from vllm import SamplingParams

    core = engine.llm.llm_engine
    inner = core.engine_core.engine_core
    pool = inner.scheduler.kv_cache_manager.block_pool
    state = inner.model_executor.driver_worker.worker.model_runner.model_state
    canvas = state.steps.canvas
    engine.run(mixed_requests(8, seed=3))
    free = pool.get_num_free_blocks()
    for i in range(12):  # more than there are slots: some wait, some run
        params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, detokenize=False)
        core.add_request(f"leak-{i}", {"prompt_token_ids": [i + 1] * 20}, params)
    for _ in range(5):
        core.step()
    assert canvas.requests
    core.abort_request([f"leak-{i}" for i in range(12)])
    engine.run(mixed_requests(8, seed=4))
    assert pool.get_num_free_blocks() == free
    assert state.tracer._files == {}
    # vLLM tells a worker of finished requests with its next batch: but for the last one there is none left.
    engine.run([{"prompt": [1, 2], "max_tokens": 2}])
    assert [(r.prompt_len, r.canvas_len) for r in canvas.requests.values()] == [(2, 2)]


def test_a_request_id_cannot_leave_the_trace_directory(engine: Engine) -> None:
    from vllm import SamplingParams

    core = engine.llm.llm_engine
    params = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True, detokenize=False)
    core.add_request("../../../escaped/x", {"prompt_token_ids": [1, 2]}, params)
    while core.has_unfinished_requests():
        core.step()
    (trace,) = engine.trace_dir.glob("*escaped*")
    assert json.loads(trace.read_text().splitlines()[0])["request_id"].startswith("../../../escaped/x")
    assert not (engine.trace_dir / "../../../escaped").exists()
