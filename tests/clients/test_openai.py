"""The official OpenAI client: blocking, asynchronous, streaming, several choices, log-probabilities, errors."""

from __future__ import annotations

import asyncio
from typing import Any

import openai
import pytest

from tests.clients.conftest import ANSWER, CHAT, MODEL
from tests.e2e.server import Server

SETTINGS: dict[str, Any] = {"api_key": "none", "max_retries": 0, "timeout": 300}
ASK: dict[str, Any] = {"model": MODEL, "messages": CHAT, "max_tokens": 32}


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", **SETTINGS)


def test_chat_and_completions(client: openai.OpenAI) -> None:
    assert client.models.list().data[0].id == MODEL
    chat = client.chat.completions.create(**ASK)
    assert (chat.choices[0].message.content, chat.choices[0].finish_reason) == (ANSWER, "stop")
    text = client.completions.create(
        model=MODEL, prompt="Reverse: stream", max_tokens=8, extra_body={"ignore_eos": True}
    )
    assert (text.usage.completion_tokens, text.choices[0].finish_reason) == (8, "length")


def test_responses(client: openai.OpenAI) -> None:
    answer = client.responses.create(model=MODEL, input=CHAT, max_output_tokens=32)
    assert answer.output_text == ANSWER
    with client.responses.stream(model=MODEL, input=CHAT, max_output_tokens=32) as stream:
        text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
    assert text == ANSWER


def test_streams(client: openai.OpenAI) -> None:
    chunks = list(client.chat.completions.create(**ASK, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == ANSWER
    assert chunks[-1].usage.completion_tokens == client.chat.completions.create(**ASK).usage.completion_tokens
    pieces = client.completions.create(model=MODEL, prompt="abc", max_tokens=8, stream=True)
    assert (
        "".join(p.choices[0].text for p in pieces)
        == client.completions.create(model=MODEL, prompt="abc", max_tokens=8).choices[0].text
    )


@pytest.mark.parametrize("snapshots", [0, 1])
def test_the_helper_that_accumulates_a_stream(client: openai.OpenAI, snapshots: int) -> None:
    """Snapshots are chunks without choices, which this helper passes over."""
    extra = {"vllm_xargs": {"d2cache_snapshots": snapshots}}
    with client.chat.completions.stream(**ASK, extra_body=extra) as stream:
        assert any(event.type == "chunk" for event in stream)
        assert stream.get_final_completion().choices[0].message.content == ANSWER


def test_choices_and_seeds(client: openai.OpenAI) -> None:
    unsure: dict[str, Any] = {"messages": [{"role": "user", "content": "Tell me about apples and shells."}]}
    fields = {**ASK, **unsure, "n": 3, "temperature": 2.0, "seed": 7}
    texts = [c.message.content for c in client.chat.completions.create(**fields).choices]
    assert len(set(texts)) > 1
    streamed = ["", "", ""]
    for chunk in client.chat.completions.create(**fields, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] += choice.delta.content or ""
    assert streamed == texts


def test_log_probabilities(client: openai.OpenAI) -> None:
    entries = client.chat.completions.create(**ASK, logprobs=True, top_logprobs=3).choices[0].logprobs.content
    assert "".join(e.token for e in entries).startswith(ANSWER)
    for entry in entries:
        assert entry.logprob <= 0
        assert len(entry.top_logprobs) == 3
    text = client.completions.create(model=MODEL, prompt="abc", max_tokens=6, logprobs=2).choices[0]
    assert len(text.logprobs.tokens) == len(text.logprobs.top_logprobs)


def test_asynchronously(server: Server) -> None:
    async def run() -> None:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", **SETTINGS) as client:

            async def ask(streaming: bool) -> str:
                if not streaming:
                    return (await client.chat.completions.create(**ASK)).choices[0].message.content
                stream = await client.chat.completions.create(**ASK, stream=True)
                return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

            assert await asyncio.gather(*(ask(i % 2 == 0) for i in range(8))) == [ANSWER] * 8

    asyncio.run(run())


def test_errors_have_the_classes_of_the_client(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="d2cache_windw") as refused:
        client.chat.completions.create(**ASK, extra_body={"vllm_xargs": {"d2cache_windw": 3}})
    assert refused.value.body["type"]
    with pytest.raises(openai.BadRequestError, match="max_tokens"):
        client.completions.create(model=MODEL, prompt="abc", max_tokens=10**6)
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(**{**ASK, "model": "another"})
