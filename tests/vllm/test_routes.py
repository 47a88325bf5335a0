"""What routes answer to requests that cannot be answered: HTTP 400, streaming or not, and nothing of it in the log."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.vllm.front_end_server import TINY, FrontEnd, front_end
from tests.vllm.routes import ASK, ROUTES, STREAMING, answered, cap_flags, refused, send

pytestmark = pytest.mark.vllm

MASK, EOS, LENGTH = 309, 305, 4096


@pytest.fixture(scope="module")
def server() -> Iterator[FrontEnd]:
    """A server without flags."""
    with pytest.MonkeyPatch.context() as patch, front_end(patch) as running:
        yield running


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("route", STREAMING)
def test_what_is_fine_is_answered(server: FrontEnd, route: str, stream: bool) -> None:
    request = answered(server, route, stream=stream, vllm_xargs={"d2cache_policy": "full"})
    assert request.sampling_params.max_tokens == 8
    assert request.sampling_params.extra_args == {"d2cache_policy": "full"}


SCHEMA = {"type": "string", "not": {"const": "a"}}
UNCOMPILED = {"type": "string", "minLength": -1}  # vLLM reads it, and fails in the engine
# What is refused -> its name in the message, and the routes that have such a field.
REFUSALS: list[tuple[dict[str, Any], str, tuple[str, ...]]] = [
    ({"vllm_xargs": {"d2cache_policy": "qsecretq"}}, "d2cache_policy", STREAMING),
    ({"vllm_xargs": {"d2cache_qsecretq": 3}}, "d2cache_qsecretq", STREAMING),
    ({"vllm_xargs": {"d2cache_window": -1}}, "d2cache_window", STREAMING),
    ({"vllm_xargs": {"d2cache_current_k": 3, "d2cache_policy": "dual"}}, "d2cache_current_k", STREAMING),
    ({"vllm_xargs": {"d2cache_report": 1}, "stream": True}, "d2cache_report", STREAMING),
    ({"vllm_xargs": {"d2cache_canvas": [5, 6]}}, "d2cache_canvas", STREAMING),
    ({"min_p": 0.1, "temperature": 1.0}, "min_p", ("completions", "chat", "responses")),
    ({"bad_words": ["ab qsecretq"]}, "bad_words", ("completions", "chat")),
    ({"logit_bias": {"999999": 1.0}}, "logit_bias", ("completions", "chat", "responses")),
    ({"allowed_token_ids": [MASK]}, "allowed_token_ids", ("completions", "chat")),
    ({"priority": 3}, "priority", ("completions", "chat", "responses")),
    ({"stop_token_ids": [99999]}, "stop_token_ids", ("completions", "chat", "responses")),
    ({"stop_token_ids": list(range(200))}, "stop_token_ids", ("completions", "chat", "responses")),
    ({"structured_outputs": {"regex": "(qsecretq"}}, "regex", ("completions", "chat", "responses")),
    ({"structured_outputs": {"regex": "a[^\\s\\S]"}}, "structured_outputs", ("completions", "chat", "responses")),
    ({"structured_outputs": {"grammar": "root ::= root"}}, "structured_outputs", ("completions", "chat", "responses")),
    ({"structured_outputs": {"json": SCHEMA}}, "structured_outputs", ("completions", "chat", "responses")),
    ({"structured_outputs": {"json": UNCOMPILED}}, "minLength", ("completions", "chat", "responses")),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": UNCOMPILED}}}, "minLength",
     ("completions", "chat")),
    ({"text": {"format": {"type": "json_schema", "name": "a", "schema": UNCOMPILED}}}, "minLength", ("responses",)),
    ({"output_config": {"format": {"type": "json_schema", "schema": UNCOMPILED}}}, "minLength", ("messages",)),
    ({"structured_outputs": {"structural_tag": json.dumps(
        {"type": "structural_tag", "format": {"type": "json_schema", "json_schema": UNCOMPILED}})}}, "minLength",
     ("completions", "chat", "responses")),
    ({"structured_outputs": {"regex": "^a$b"}}, "'$'", ("completions", "chat", "responses")),
    ({"structured_outputs": {"regex": "a+"}, "vllm_xargs": {"d2cache_decoder": "eb"}}, "d2cache_decoder",
     ("completions", "chat", "responses")),
    ({"min_p": 0.1}, "min_p", ("completions", "chat", "responses")),
    ({"logit_bias": {"66": 1e30}}, "logit_bias", ("completions", "chat", "responses")),
    ({"tools": [{"type": "web_search"}]}, "tools[0].type", ("responses",)),
    ({"tools": [{"type": "function", "function": {"name": "f", "qsecretq": 1}}]}, "tools[0].function", ("chat",)),
    ({"tool_choice": {"type": "any"}}, "tool_choice", ("messages",)),
    ({"system": [{"type": "image"}]}, "system[0].type", ("messages",)),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA}}}, "response_format",
     ("chat",)),
    ({"stream_interval": 2**70}, "stream_interval", ("completions", "chat")),
    ({"top_k": 2**70, "temperature": 1.0}, "top_k", STREAMING),
    ({"structured_outputs": {"regex": "a", "qsecretq": 1}}, "structured_outputs", ("completions", "chat", "responses")),
    ({"structured_outputs": {"json": {}, "whitespace_pattern": "qsecretq"}}, "structured_outputs.whitespace_pattern",
     ("completions", "chat", "responses")),
    ({"structured_outputs": {"json": "qsecretq"}}, "structured_outputs", ("completions", "chat", "responses")),
    ({"structured_outputs": {"choice": []}}, "structured_outputs", ("completions", "chat", "responses")),
    ({"response_format": {"type": "json_object", "schema": {"type": "object"}}}, "response_format.schema",
     ("completions", "chat")),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {}, "qsecretq": 1}}},
     "response_format.json_schema", ("completions", "chat")),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}}, "response_format",
     ("completions", "chat")),
    ({"stream": True, "stream_options": {"qsecretq": 1}}, "stream_options.qsecretq", ("completions", "chat")),
    ({"text": {"verbosity": "high"}}, "text.verbosity", ("responses",)),
    ({"text": {"qsecretq": 1}}, "text.qsecretq", ("responses",)),
    ({"reasoning": {"summary": "auto"}}, "reasoning.summary", ("responses",)),
    ({"top_logprobs": 5}, "top_logprobs", ("responses",)),
    ({"output_config": {"qsecretq": 1}}, "output_config.qsecretq", ("messages",)),
    ({"vllm_xargs": {"d2cache_window": 2**70}}, "vllm_xargs", STREAMING),
    ({"suffix": "qsecretq"}, "suffix", ("completions",)),
    ({"use_beam_search": True}, "use_beam_search", ("chat",)),
    ({"top_k": -5}, "top_k", STREAMING),
    ({"kv_transfer_params": {"do_remote_decode": True}}, "kv_transfer_params", ("completions", "chat", "messages")),
]  # fmt: skip


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("fields", "name", "route"),
    [(f, name, route) for f, name, routes in REFUSALS for route in routes],
    ids=lambda v: v if isinstance(v, str) else json.dumps(v)[:60],
)
def test_refused_before_a_stream_begins(
    server: FrontEnd, fields: dict[str, Any], name: str, route: str, stream: bool
) -> None:
    refused(server, route, name, **{"stream": stream, **fields})
    assert "qsecretq" not in server.log


# A field of a wrong type, or one that is empty, and the routes whose vLLM checks break on it or do not name it.
WRONG: list[tuple[str, Any, tuple[str, ...]]] = [
    *(("structured_outputs", value, ("completions", "chat")) for value in ("x", 0, 1.5, True, [], [1], {})),
    *(("messages", value, ("chat",)) for value in (None, 5, False)),
    ("messages", [], ("chat", "messages")),
    ("messages", [{"role": "user", "content": [1]}], ("chat",)),
    ("input", [], ("responses",)),
    *(("tools", value, ("responses",)) for value in (-1, 1.5, True)),
    *(("prompt", value, ("completions",)) for value in ([9999], [[]], [""], [])),
    ("max_completion_tokens", -1, ("chat",)),
    ("truncate_prompt_tokens", 0, ("completions", "chat")),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("field", "value", "route"), [(f, v, route) for f, v, routes in WRONG for route in routes], ids=str
)
def test_a_field_of_a_wrong_type_is_named(server: FrontEnd, field: str, value: Any, route: str, stream: bool) -> None:
    """vLLM answers some of these with HTTP 500, and others with Python's words for what went wrong."""
    message = refused(server, route, field.partition("_prompt_")[0], stream=stream, **{field: value})
    assert "has no attribute" not in message and "NoneType' object" not in message


@pytest.mark.parametrize("length", [0, -1])
@pytest.mark.parametrize("route", ["completions", "chat", "responses", "batch"])
def test_an_empty_canvas_is_refused_by_the_routes_own_name(server: FrontEnd, route: str, length: int) -> None:
    assert refused(server, route, ROUTES[route][2], length=length)


def test_null_is_the_default(server: FrontEnd) -> None:
    """The answers of /v1/responses repeat these fields and had no word for null."""
    for field in ("background", "truncation"):
        for stream in (False, True):
            answered(server, "responses", stream=stream, **{field: None})


def test_a_completion_may_ask_for_its_prompt_alone(server: FrontEnd) -> None:
    response = send(server, "completions", length=0, echo=True)
    assert (response.status_code, response.json()["choices"][0]["text"]) == (200, "a")


@pytest.mark.parametrize("route", ROUTES)
def test_a_canvas_that_does_not_fit(server: FrontEnd, route: str) -> None:
    """Which of us says so depends on the length: beyond max_model_len it is vLLM."""
    name = ROUTES[route][2]
    for stream in (False, True) if route != "batch" else (False,):
        for length in (LENGTH, 5000):
            message = refused(server, route, length=length, stream=stream)
            assert name.removeprefix("max_") in message or "output" in message


def long_prompt(route: str, left: int) -> dict[str, Any]:
    """Fields of a prompt that leaves so many positions; of completions exactly so many."""
    if route == "completions":
        return {"prompt": [7] * (LENGTH - left)}
    text = "a" * (LENGTH - left - 30)
    messages = [{"role": "user", "content": text}]
    return {"responses": {"input": text}, "batch": {"messages": [messages]}}.get(route, {"messages": messages})


@pytest.mark.parametrize("route", [route for route in ROUTES if route != "messages"])
def test_the_default_canvas_is_refused_where_it_does_not_fit(server: FrontEnd, route: str) -> None:
    """The same everywhere; without max_tokens it is 256."""
    name = ROUTES[route][2]
    refused(server, route, f"{name}: the default canvas of 256 positions does not fit behind this prompt", length=None,
            **long_prompt(route, 85))  # fmt: skip
    assert answered(server, route, length=None).sampling_params.max_tokens == 256
    null = ROUTES[route][2]
    assert answered(server, route, length=None, **{null: None}).sampling_params.max_tokens == 256
    assert answered(server, route, length=20, **long_prompt(route, 85)).sampling_params.max_tokens == 20


def test_a_prompt_that_leaves_no_room(server: FrontEnd) -> None:
    for length in (None, 1):
        message = refused(server, "completions", "prompt", length=length, **long_prompt("completions", 0))
        ours = "the prompt leaves no room for a canvas; shorten it by at least 1 tokens" in message
        # vLLM 0.31 asks first where the request names a length.
        assert ours or (length == 1 and "maximum context length" in message), message
        assert "1 to 0" not in message


def test_a_given_canvas_sets_the_length(server: FrontEnd) -> None:
    canvas = {"vllm_xargs": {"d2cache_canvas": [-1, 5, -1]}}
    for route in ("completions", "chat", "responses"):
        assert answered(server, route, length=None, **canvas).sampling_params.max_tokens == 3
        field = "max_output_tokens" if route == "responses" else "max_tokens"
        refused(server, route, f"{field}: must be the length of d2cache_canvas, 3", length=4, **canvas)


# --- text that is none ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("field", ["d2cache_policy", "guided_json", "max_tokns"])
def test_unknown_fields_are_refused_on_every_route(server: FrontEnd, route: str, field: str) -> None:
    refused(server, route, f"{field}: no such field", **{field: "x"})


@pytest.mark.parametrize("field", ["ignore_eos", "prompt_logprobs", "min_p", "seed", "stop_token_ids"])
def test_fields_of_other_routes_are_refused_where_they_are_dropped(server: FrontEnd, field: str) -> None:
    refused(server, "messages", f"{field}: no such field", **{field: 1})


def test_prompt_logprobs_of_a_response(server: FrontEnd) -> None:
    refused(server, "responses", "prompt_logprobs: no such field", prompt_logprobs=1)
    assert answered(server, "responses", ignore_eos=True).sampling_params.ignore_eos


NEUTRAL: dict[str, Any] = {
    "best_of": 1,
    "extra_body": {},
    "function_call": "none",
    "functions": [],
    "metadata": {"user_id": "x"},
    "modalities": ["text"],
    "prediction": None,
    "service_tier": "auto",
    "verbosity": "medium",
}


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("field", NEUTRAL)
def test_what_asks_for_nothing_is_accepted(server: FrontEnd, route: str, field: str) -> None:
    answered(server, route, **{field: NEUTRAL[field]})


@pytest.mark.parametrize(
    ("field", "value"),
    [("best_of", 2), ("modalities", ["text", "audio"]), ("functions", [{"name": "f"}]), ("web_search_options", {})],
)
def test_what_asks_for_something_is_not(server: FrontEnd, field: str, value: Any) -> None:
    for route in ROUTES:
        if route != "batch" or field != "best_of":  # that class has the field, and vLLM drops it
            refused(server, route, f"{field}: no such field", **{field: value})


def test_a_batch_does_not_stream(server: FrontEnd) -> None:
    refused(server, "batch", "stream: a batch is answered as a whole", stream=True)
    answered(server, "batch", stream=False)
    for option in ("d2cache_report", "d2cache_snapshots"):
        refused(server, "batch", f"{option}: is for one conversation", vllm_xargs={option: 1})
        answered(server, "batch", vllm_xargs={option: 0})


def test_snapshots_are_refused_where_none_are_sent(server: FrontEnd) -> None:
    wanted = {"vllm_xargs": {"d2cache_snapshots": 1}}
    for route in STREAMING:
        refused(server, route, "d2cache_snapshots: comes with", stream=False, **wanted)
    for route in ("responses", "messages"):
        refused(server, route, "d2cache_snapshots: comes with", stream=True, **wanted)
    for route in ("completions", "chat"):
        answered(server, route, stream=True, **wanted)
        refused(server, route, "d2cache_snapshots: comes with", stream=False, **wanted)


# --- echo -----------------------------------------------------------------------------------------------------------


def test_echo(server: FrontEnd) -> None:
    start = {"messages": [*ASK, {"role": "assistant", "content": "dc"}], "add_generation_prompt": False}
    response = send(server, "chat", echo=True, continue_final_message=True, **start)
    assert response.json()["choices"][0]["message"]["content"].startswith("dc(")
    assert send(server, "completions", echo=True).json()["choices"][0]["text"].startswith("a(")
    for route, fields in {"chat": {"logprobs": True, "top_logprobs": 2}, "completions": {"logprobs": 0}}.items():
        for stream in (False, True):
            refused(server, route, "echo: with logprobs", echo=True, stream=stream, **fields)


# --- defaults of the operator ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("named", ["override", "directory"])
def test_the_operators_cap(named: str, tmp_path: Path) -> None:
    flags = cap_flags(named, tmp_path)
    with pytest.MonkeyPatch.context() as patch, front_end(patch, TINY, *flags) as server:
        for route in ("completions", "chat", "responses", "batch"):
            assert answered(server, route, length=None).sampling_params.max_tokens == 24
            assert answered(server, route, length=24).sampling_params.max_tokens == 24
            field = ROUTES[route][2]
            refused(server, route, f"{field}: a canvas of 25 positions is longer than the operator's max_new_tokens",
                    "1 to 24", length=25)  # fmt: skip


def test_a_directory_without_a_cap(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({"temperature": 0.5}))
    with (
        pytest.MonkeyPatch.context() as patch,
        front_end(patch, TINY, "--generation-config", str(tmp_path)) as server,
    ):
        for route in ("completions", "chat", "responses"):
            assert answered(server, route, length=300).sampling_params.max_tokens == 300
            params = answered(server, route, length=None).sampling_params
            assert (params.max_tokens, params.temperature) == (256, 0.5)
