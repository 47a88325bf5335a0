"""Structured output over HTTP with the official client: the answers, and what is refused."""

from __future__ import annotations

import json
import random
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pydantic
import pytest

from tests.e2e.grammars import random_constraint
from tests.e2e.server import TINY, Server

pytestmark = [pytest.mark.vllm, pytest.mark.engine]

CHAT = [{"role": "user", "content": "Reverse: abcdefgh"}]


class Pet(pydantic.BaseModel):
    """What the client wants to read."""

    model_config = pydantic.ConfigDict(extra="forbid")
    name: str = pydantic.Field(max_length=8)
    legs: int = pydantic.Field(ge=0, le=8)
    tame: bool


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=300)


REGEX = {"structured_outputs": {"regex": "a"}}


def ask(client: openai.OpenAI, **fields: Any) -> Any:
    return client.chat.completions.create(**{"model": TINY, "messages": CHAT, "max_tokens": 96, **fields})


def schema_format(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}


def test_a_class_is_read_by_the_client(client: openai.OpenAI) -> None:
    answer = client.chat.completions.parse(model=TINY, messages=CHAT, max_tokens=96, response_format=Pet)
    assert answer.choices[0].finish_reason == "stop"
    assert isinstance(answer.choices[0].message.parsed, Pet)


def test_streams_logprobs_and_samples_are_of_the_same_text(client: openai.OpenAI) -> None:
    wanted = schema_format(Pet.model_json_schema())
    whole = ask(client, response_format=wanted, logprobs=True, top_logprobs=2).choices[0]
    Pet.model_validate_json(whole.message.content)
    chunks = list(ask(client, response_format=wanted, stream=True))
    pieces = [c.choices[0].delta.content for c in chunks if c.choices and c.choices[0].delta.content]
    assert "".join(pieces) == whole.message.content
    assert "".join(e.token for e in whole.logprobs.content).startswith(whole.message.content)
    samples = ask(client, response_format=wanted, n=3, temperature=1.5, seed=1).choices
    texts = [Pet.model_validate_json(c.message.content) for c in samples if c.finish_reason == "stop"]
    assert len(texts) >= 2
    assert len({str(t) for t in texts}) > 1


def test_random_constraints_at_once(client: openai.OpenAI) -> None:
    """Free requests among them."""
    rng = random.Random(5)
    constraints = [random_constraint(rng) if i % 3 else None for i in range(24)]

    def one(number: int) -> tuple[str, str]:
        constraint = constraints[number]
        extra = {"structured_outputs": {constraint.kind: constraint.value}} if constraint else {}
        choice = ask(client, seed=number, temperature=number % 2, extra_body=extra).choices[0]
        return choice.message.content, choice.finish_reason

    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(one, range(len(constraints))))
    for number, (constraint, (text, reason)) in enumerate(zip(constraints, answers, strict=True)):
        if constraint is None:
            assert (text, reason) == one(number) if number % 2 else text == "hgfedcba"
        elif reason == "stop":
            assert constraint.fits(text), (constraint, text)
    assert sum(reason == "stop" for _, reason in answers) >= 0.8 * len(answers)


def test_a_stop_token_or_string_still_ends_the_text(client: openai.OpenAI) -> None:
    wanted = {"structured_outputs": {"regex": "[a-d]{3}x[a-d]{3}"}}
    assert ask(client, stop=["x"], extra_body=wanted).choices[0].message.content in {
        a + b + c for a in "abcd" for b in "abcd" for c in "abcd"
    }


BAD: list[tuple[dict[str, Any], str]] = [
    ({"response_format": schema_format({"type": "nonsense"})}, "schema"),
    ({"response_format": schema_format({"type": "integer", "multipleOf": 3})}, "schema"),
    ({"structured_outputs": {"json": "{"}}, "JSON"),
    ({"structured_outputs": {"regex": "[a"}}, "regex"),
    ({"structured_outputs": {"grammar": "root ::= ("}}, "grammar"),
    ({"structured_outputs": {"choice": []}}, "hoice"),
    ({"structured_outputs": {"structural_tag": "{}"}}, "structural_tag"),
    ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "one kind of constraint"),
    ({**REGEX, "ignore_eos": True}, "ignore_eos"),
    ({**REGEX, "min_tokens": 3}, "min_tokens"),
    ({**REGEX, "bad_words": ["a"]}, "bad_words"),
    ({**REGEX, "allowed_token_ids": [5]}, "allowed_token_ids"),
    ({**REGEX, "max_tokens": 2, "vllm_xargs": {"d2cache_canvas": [5, -1]}}, "d2cache_canvas"),
    ({**REGEX, "vllm_xargs": {"d2cache_factor": 1.0}}, "d2cache_factor"),
    ({**REGEX, "vllm_xargs": {"d2cache_decoder": "eb"}}, "d2cache_decoder"),
]


@pytest.mark.parametrize(("fields", "named"), BAD, ids=[f"{i}-{named}" for i, (_, named) in enumerate(BAD)])
def test_what_cannot_be_kept_is_refused_by_name(client: openai.OpenAI, fields: dict[str, Any], named: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, extra_body=fields)
    assert named in str(caught.value)


def test_a_canvas_too_short_for_the_grammar_ends_with_length(client: openai.OpenAI) -> None:
    choice = ask(client, max_tokens=6, response_format=schema_format(Pet.model_json_schema())).choices[0]
    assert choice.finish_reason == "length"
    assert choice.message.content.startswith("{")


def test_completions_take_it_too(server: Server) -> None:
    body = {"prompt": "abc", "max_tokens": 40, "structured_outputs": {"json_object": True}}
    answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=300).json()["choices"][0]
    if answer["finish_reason"] == "stop":
        assert isinstance(json.loads(answer["text"]), dict)
    else:
        assert answer["text"].lstrip().startswith("{")
