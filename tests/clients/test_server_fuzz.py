"""Requests that nobody would write: made from the server's own schema, and from its own options. `make fuzz` has more.

Whatever comes in is answered or refused, never with a server error but for the causes that docs/api.md lists, and the
server answers a plain question afterwards as it did before.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import given, note
from hypothesis import strategies as st
from schemathesis import GenerationMode

from tests.clients.conftest import CHAT, MODEL
from tests.e2e.server import Server

DOC = (Path(__file__).resolve().parents[2] / "docs" / "api.md").read_text()
LISTED = re.findall(r"^\| 5\d\d \| `([^`]+)`", DOC, re.MULTILINE)
REFERENCE = {
    "model": MODEL,
    "prompt": "Reverse: stream",
    "max_tokens": 16,
    "ignore_eos": True,
    "return_token_ids": True,
}
# A request that is right: most of what is made from a schema alone is refused before it gets anywhere.
RIGHT: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "abc", "max_tokens": 4},
    "/v1/chat/completions": {"messages": CHAT, "max_tokens": 4},
    "/v1/chat/completions/batch": {"messages": [CHAT], "max_tokens": 4},
    "/v1/responses": {"input": "abc", "max_output_tokens": 4},
    "/v1/messages": {"model": MODEL, "messages": CHAT, "max_tokens": 4},
    "/v1/messages/count_tokens": {"model": MODEL, "messages": CHAT},
    "/tokenize": {"prompt": "abc"},
    "/detokenize": {"tokens": [5, 6, 7]},
    "/generative_scoring": {"query": "abc", "items": ["d", "e"], "label_token_ids": [5, 6]},
    "/v1/systemone": {"state": "abc", "questions": {"q": {"type": "choice", "criteria": ["a", "b"]}}},
}
# What these ask for is refused: docs/api.md.
REFUSED = {"/generative_scoring", "/v1/systemone"}
# Text of a listed server error -> a route whose right request brings it.
SERVER_ERRORS = {"The model does not support the structured decision API": "/v1/systemone"}
# Not sent: aliases of what is, and what belongs to the operator.
LEFT_OUT = {"/invocations", "/scale_elastic_ep", "/is_scaling_elastic_ep", "/kv_event_sources"}
SIMPLE = {"/ping", "/health", "/load", "/version", "/metrics", "/v1/models"}
BY_ID = ("/v1/responses/{response_id}", "/v1/responses/{response_id}/cancel")
# Canvas and n of what is made here: a valid request may ask for all of max_model_len, and 16,384 times.
LONGEST = 8


@pytest.fixture
def http(server: Server) -> Iterator[httpx.Client]:
    """A client; after the test nothing runs any more, and the server writes what it wrote before."""
    with httpx.Client(base_url=server.url, timeout=120) as client:
        before = client.post("/v1/completions", json=REFERENCE).json()["choices"][0]["token_ids"]
        yield client
        deadline = time.monotonic() + 60
        while running(client):
            assert time.monotonic() < deadline, "requests are left"
            time.sleep(0.2)
        after = client.post("/v1/completions", json=REFERENCE)
        assert after.status_code == 200, after.text
        assert after.json()["choices"][0]["token_ids"] == before


def running(client: httpx.Client) -> float:
    """How many requests the engine works on."""
    lines = client.get("/metrics").text.splitlines()
    return sum(
        float(line.rpartition(" ")[2]) for line in lines if re.match("vllm:num_requests_(running|waiting){", line)
    )


@pytest.fixture(scope="module")
def schema(server: Server) -> Any:
    return schemathesis.openapi.from_url(f"{server.url}/openapi.json")


def bounded(path: str, body: Any) -> Any:
    """The body with a short canvas and few choices."""
    if not isinstance(body, dict):
        return body
    names = {"max_tokens", "max_completion_tokens", "max_output_tokens", "n"}
    short = {k: min(v, LONGEST) if k in names and isinstance(v, int | float) else v for k, v in body.items()}
    if not names & set(short):
        short |= dict.fromkeys(names & set(RIGHT[path]), 4)
    return short


def send(http: httpx.Client, path: str, body: Any) -> bool:
    """Whether it was answered; what JSON cannot hold is not sent."""
    try:
        content = json.dumps(bounded(path, body)).encode()
    except (TypeError, ValueError):
        return False
    response = http.post(path, content=content, headers={"Content-Type": "application/json"})
    expected = any(cause in response.text for cause in LISTED)
    assert response.status_code < 500 or expected, (path, content, response.status_code, response.text)
    return response.status_code == 200


def test_server_errors_that_are_listed_still_happen(http: httpx.Client) -> None:
    assert set(SERVER_ERRORS) == set(LISTED)
    for text, path in SERVER_ERRORS.items():
        response = http.post(path, json=RIGHT[path])
        assert response.status_code >= 500
        assert text in response.text


def test_every_operation_is_tried_or_left_out_for_a_reason(http: httpx.Client, schema: Any) -> None:
    served = {result.ok().path for result in schema.get_all_operations()}
    assert served <= {*RIGHT, *SIMPLE, *BY_ID, *LEFT_OUT}
    assert all(http.get(path).status_code == 200 for path in SIMPLE & served)
    for name in ("resp_1", "%00", "../x", "é" * 200):
        assert 400 <= http.get(f"/v1/responses/{name}").status_code < 500
        assert 400 <= http.post(f"/v1/responses/{name}/cancel").status_code < 500


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=["right", "wrong"])
@pytest.mark.parametrize("path", RIGHT)
def test_bodies_from_the_schema(http: httpx.Client, schema: Any, path: str, mode: Any) -> None:
    @given(case=schema[path]["POST"].as_strategy(generation_mode=mode))
    def run(case: Any) -> None:
        send(http, path, case.body)

    run()


@pytest.mark.parametrize("path", RIGHT)
def test_right_requests_with_a_few_fields_from_the_schema(http: httpx.Client, schema: Any, path: str) -> None:
    answered = send(http, path, RIGHT[path])
    assert answered != (path in REFUSED)

    @given(case=schema[path]["POST"].as_strategy(), choose=st.randoms(use_true_random=False))
    def run(case: Any, choose: Any) -> None:
        if isinstance(case.body, dict):
            names = sorted(case.body)
            chosen = choose.sample(names, min(len(names), choose.randint(1, 2)))
            send(http, path, {**RIGHT[path], **{name: case.body[name] for name in chosen}})

    run()


# --- our own options -----------------------------------------------------------------------------------------------

NUMBERS = st.one_of(
    st.integers(-2, 20),
    st.sampled_from([0.5, 0.9, 1, 1.0, 1.5, 1e-9, 1e9, 2**31, 2**63 - 1, -(2**63)]),
    st.floats(allow_nan=False, allow_infinity=False),
)
WORDS = st.one_of(st.just(""), st.text(max_size=4))
CANVASES = st.lists(st.integers(-2, 320), max_size=10)


def refusal(http: httpx.Client, options: dict[str, Any]) -> str:
    """The message of a request with options that must be refused."""
    response = http.post("/v1/completions", json={"prompt": "abc", "max_tokens": 4, "vllm_xargs": options})
    assert response.status_code == 400
    return response.json()["error"]["message"]


def valid_options(http: httpx.Client) -> dict[str, list[str]]:
    """The options by name, each with the words it takes: as the server's own messages list them."""
    names = re.findall(r"d2cache_\w+", refusal(http, {"d2cache_": 1}).partition("valid options are ")[2])
    assert {"d2cache_policy", "d2cache_window", "d2cache_canvas"} <= set(names)
    return {n: re.findall(r"'([a-z_0-9]+)'", refusal(http, {n: "?"}).partition(", got ")[0]) for n in names}


def test_options(http: httpx.Client) -> None:
    """Answered, or refused by a name that the request has."""
    options = valid_options(http)
    assert "full" in options["d2cache_policy"]
    assert "wino" in options["d2cache_decoder"]

    def value(name: str) -> st.SearchStrategy[Any]:
        words = st.sampled_from(options[name]) if options[name] else NUMBERS
        return st.one_of(words, words, words, NUMBERS, WORDS, CANVASES)

    chosen = st.lists(st.sampled_from(sorted(options)), min_size=1, max_size=4, unique=True)

    @given(xargs=chosen.flatmap(lambda names: st.fixed_dictionaries({name: value(name) for name in names})))
    def run(xargs: dict[str, Any]) -> None:
        body = {"prompt": "abc", "max_tokens": 6, "ignore_eos": True, "vllm_xargs": xargs}
        response = http.post("/v1/completions", json=body)
        note(f"{response.status_code} {response.text[:500]}")
        if response.status_code == 200:
            assert response.json()["usage"]["completion_tokens"] == 6
        else:
            assert response.status_code == 400, response.text
            message = response.json()["error"]["message"]
            assert any(name in message for name in (*xargs, "max_tokens", "extra_args")), message

    run()
