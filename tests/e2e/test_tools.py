"""Tools with the official client, against a server of the small trained Dream that has a tool parser."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.e2e.server import Server, serve

pytestmark = [pytest.mark.vllm, pytest.mark.engine]

ROOT = Path(__file__).resolve().parents[2]
MODEL = str(ROOT / "models" / "tiny-dream")
FLAGS = ("--enable-auto-tool-choice", "--tool-call-parser", "hermes", "--max-model-len", "512")


def tool(name: str, **properties: Any) -> dict[str, Any]:
    parameters = {"type": "object", "properties": properties, "required": [*properties], "additionalProperties": False}
    return {"type": "function", "function": {"name": name, "strict": True, "parameters": parameters}}


TOOLS = [
    tool("weather", city={"type": "string", "maxLength": 6}, days={"type": "integer", "minimum": 1, "maximum": 9}),
    tool("stop_all"),
]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serve(tmp_path_factory.mktemp("tools") / "log", *FLAGS, model=MODEL) as running:
        yield running


@pytest.fixture(scope="module")
def client(served: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0, timeout=300)


def ask(client: openai.OpenAI, **fields: Any) -> Any:
    messages = [{"role": "user", "content": "Reverse: abcdefgh"}]
    return client.chat.completions.create(
        **{"model": MODEL, "messages": messages, "max_tokens": 128, "tools": TOOLS, **fields}
    )


def check_call(name: str, arguments: str) -> None:
    read = json.loads(arguments)
    if name == "weather":
        assert set(read) == {"city", "days"}
        assert len(read["city"]) <= 6
        assert 1 <= read["days"] <= 9
    else:
        assert (name, read) == ("stop_all", {})


NAMED = {"type": "function", "function": {"name": "weather"}}


@pytest.mark.parametrize("choice", ["required", NAMED], ids=["required", "named"])
def test_a_call_that_must_come_comes(client: openai.OpenAI, choice: Any) -> None:
    answer = ask(client, tool_choice=choice, parallel_tool_calls=False).choices[0]
    assert answer.finish_reason in ("tool_calls", "stop")
    (call,) = answer.message.tool_calls
    check_call(call.function.name, call.function.arguments)
    assert choice == "required" or call.function.name == "weather"


@pytest.mark.parametrize("choice", ["required", NAMED], ids=["required", "named"])
def test_a_stream_of_a_call_is_the_same_call(client: openai.OpenAI, choice: Any) -> None:
    fields = {"tool_choice": choice, "parallel_tool_calls": False}
    whole = ask(client, **fields).choices[0].message.tool_calls[0].function
    name, arguments, deltas = "", "", 0
    for chunk in ask(client, **fields, stream=True):
        for call in (chunk.choices[0].delta.tool_calls or []) if chunk.choices else []:
            name += call.function.name or ""
            arguments += call.function.arguments or ""
            deltas += 1
    assert name == whole.name
    assert json.loads(arguments) == json.loads(whole.arguments)
    assert deltas > 1


def test_the_model_may_be_left_to_choose(client: openai.OpenAI) -> None:
    """It has not learnt to call tools, and answers."""
    for choice in ("auto", "none"):
        message = ask(client, tool_choice=choice).choices[0].message
        assert message.content == "hgfedcba"
        assert not message.tool_calls


def test_the_example_runs(served: Server) -> None:
    command = [sys.executable, str(ROOT / "examples" / "tools.py"), f"{served.url}/v1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    # A grammar allows white space between the parts of a call: the stream may take several lines.
    assert [line.split()[0] for line in lines[:3]] == ["weather", "weather", "streaming:"]
    assert lines[2].split()[1] == "weather"


def test_without_a_tool_parser_a_call_is_refused(server: Server) -> None:
    other = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=300)
    with pytest.raises(openai.BadRequestError, match="tool_choice"):
        ask(other, model=other.models.list().data[0].id, tool_choice="required")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("tools", "named"),
    [
        ([TOOLS[0], TOOLS[0]], "tools: 2 functions have the name 'weather'"),
        ([tool("")], "tools: a function has an empty name"),
        ([tool("f", a={"type": "string", "minLength": -1})], "'minLength' -1"),
        ([tool("f", a={"type": "integer", "multipleOf": 3})], "'multipleOf'"),
        ([tool("f", a={"type": "nope"})], "structural tag"),
    ],
)
def test_tools_that_are_refused(client: openai.OpenAI, tools: list[Any], named: str, stream: bool) -> None:
    """Before a stream begins; the last one by vLLM."""
    with pytest.raises(openai.BadRequestError, match=named):
        ask(client, tools=tools, tool_choice="required", stream=stream)
