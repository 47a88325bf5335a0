"""LangChain's chat class for servers that speak OpenAI's protocol."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from langchain_core.messages import AIMessageChunk, HumanMessage
from langchain_openai import ChatOpenAI

from tests.clients.conftest import ANSWER, MODEL
from tests.e2e.server import Server

QUESTION = "Reverse: abcdefgh"


@pytest.fixture(scope="module")
def settings(server: Server) -> dict[str, Any]:
    return {"base_url": f"{server.url}/v1", "api_key": "none", "model": MODEL, "max_tokens": 32, "temperature": 0}


def test_invoke(settings: dict[str, Any]) -> None:
    answer = ChatOpenAI(**settings).invoke([HumanMessage(QUESTION)])
    assert answer.content == ANSWER
    assert answer.response_metadata["finish_reason"] == "stop"
    assert answer.usage_metadata["output_tokens"] > 0


def test_stream(settings: dict[str, Any]) -> None:
    whole: AIMessageChunk | None = None
    for chunk in ChatOpenAI(**settings, stream_usage=True).stream(QUESTION):
        whole = chunk if whole is None else whole + chunk
    assert whole.content == ANSWER
    assert whole.usage_metadata["output_tokens"] > 0


def test_batch_and_async(settings: dict[str, Any]) -> None:
    model = ChatOpenAI(**settings)
    assert [m.content for m in model.batch([QUESTION] * 3)] == [ANSWER] * 3

    async def run() -> tuple[list[Any], str]:
        answers = await model.abatch([QUESTION] * 3)
        return answers, "".join([chunk.content async for chunk in model.astream(QUESTION)])

    answers, streamed = asyncio.run(run())
    assert [m.content for m in answers] == [ANSWER] * 3
    assert streamed == ANSWER


def test_options_and_log_probabilities(settings: dict[str, Any]) -> None:
    model = ChatOpenAI(**settings, extra_body={"vllm_xargs": {"d2cache_policy": "full"}}).bind(logprobs=True)
    answer = model.invoke(QUESTION)
    assert answer.content == ANSWER
    assert "".join(e["token"] for e in answer.response_metadata["logprobs"]["content"]).startswith(ANSWER)


def test_several_choices(settings: dict[str, Any]) -> None:
    model = ChatOpenAI(**{**settings, "temperature": 2.0}, n=2, seed=7)
    (generations,) = model.generate([[HumanMessage("Tell me about apples and shells.")]]).generations
    assert len({g.text for g in generations}) == 2
