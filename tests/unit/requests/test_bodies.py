"""What only the body of a request shows."""

from __future__ import annotations

import json
from typing import Any

import pytest

from vllm_d2cache.options.types import OptionError
from vllm_d2cache.requests.bodies import check_body
from vllm_d2cache.requests.naming import in_words_of

FUNCTION = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {}, "strict": True}}
USE = {"type": "tool_use", "id": "1", "name": "f", "input": {}}


def check(route: str, text: str) -> None:
    fields = {"messages", "system", "tools", "tool_choice", "max_tokens", "model", "temperature", "logit_bias"}
    check_body(route, text.encode(), fields, {})


@pytest.mark.parametrize("route", ["completions", "chat", "responses", "messages", "batch"])
@pytest.mark.parametrize("bias", ["NaN", "Infinity", "-Infinity", "1e999", "-1e30", "100.5", "101"])
def test_a_bias_that_would_be_moved_is_refused(route: str, bias: str) -> None:
    with pytest.raises(OptionError, match=r"^logit_bias: must be -100 to 100, got .* for token 66$"):
        check(route, f'{{"logit_bias": {{"5": 1, "66": {bias}}}}}')


def test_a_bias_within_the_range_passes() -> None:
    check("chat", '{"logit_bias": {"5": -100, "6": 100.0, "7": 0, "8": "x", "9": null}}')
    check("chat", '{"logit_bias": null}')


@pytest.mark.parametrize("value", ["NaN", "[1, -Infinity]", '{"x": {"y": [NaN]}}'])
def test_what_is_no_number_is_refused_by_field(value: str) -> None:
    with pytest.raises(OptionError, match=r"^temperature: has a number that is infinite or none"):
        check("completions", f'{{"temperature": {value}}}')


def test_the_words_for_no_number_in_a_text_are_a_text() -> None:
    check("completions", '{"prompt": "NaN, Infinity"}')


@pytest.mark.parametrize("kind", ["web_search", "code_interpreter", "mcp", "custom", None])
def test_responses_has_functions_alone(kind: str | None) -> None:
    tools: list[Any] = [{"type": "function", "name": "f"}, {"type": kind}]
    with pytest.raises(OptionError, match=r"^tools\[1\].type: must be 'function'"):
        check("responses", json.dumps({"tools": tools}))
    check("responses", json.dumps({"tools": tools[:1]}))


def test_keys_of_a_function_that_nobody_reads() -> None:
    wrong = {"type": "function", "function": {**FUNCTION["function"], "nonsense": 1}}  # type: ignore[dict-item]
    with pytest.raises(OptionError, match=r"^tools\[1\].function.nonsense: has no effect"):
        check("chat", json.dumps({"tools": [FUNCTION, wrong]}))
    check("chat", json.dumps({"tools": [FUNCTION]}))
    check("chat", '{"tools": [7, null, {"function": 3}]}')  # vLLM says what is wrong


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"tool_choice": {"type": "any"}}, "^tool_choice: 'any' needs tools"),
        ({"tool_choice": {"type": "tool", "name": "g"}, "tools": []}, "^tool_choice: 'tool' needs tools"),
        ({"messages": [{"content": [{"type": "image"}]}]}, r"^messages\[0\].content\[0\].source: is missing"),
        ({"messages": [{"content": "x"}, {"content": [{"type": "tool_use", "id": "1"}]}]},
         r"^messages\[1\].content\[0\].name: is missing"),
        ({"messages": [{"content": [{"type": "tool_result"}]}]}, "tool_use_id: is missing"),
        ({"messages": [{"content": [{"type": "text"}]}]}, "text: is missing"),
        ({"system": [{"type": "image"}]}, r"^system\[0\].type: must be 'text'"),
    ],
)  # fmt: skip
def test_what_messages_would_drop(body: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        check("messages", json.dumps(body))


def test_what_messages_reads() -> None:
    parts = [{"type": "text", "text": "", "cache_control": {"type": "ephemeral"}}, USE]
    body = {
        "system": [{"type": "text", "text": "s"}],
        "messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": parts}],
        "tools": [{"name": "f", "input_schema": {}}],
        "tool_choice": {"type": "any"},
    }
    check("messages", json.dumps(body))
    check("messages", json.dumps({"tool_choice": {"type": "auto"}, "messages": "x", "system": None}))


def test_a_field_is_named_as_the_request_names_it() -> None:
    fields = {"response_format", "max_output_tokens"}
    assert in_words_of("structured_outputs: no", fields) == "response_format: no"
    assert in_words_of("max_tokens: must be 3", fields) == "max_output_tokens: must be 3"
    assert in_words_of("max_tokens: must be 3", {"max_tokens"}) == "max_tokens: must be 3"
    assert in_words_of("logprobs: at most 20", fields) == "logprobs: at most 20"
    assert in_words_of("no field at all", fields) == "no field at all"
