"""Asks, streams and hangs up, as clients of the OpenAI API do."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, field
from typing import Any

import httpx

from benchmarks.load.mix import Kind

_JSON = {"Content-Type": "application/json"}


@dataclass
class Choice:
    """One answer; equal to another only if all of it is, log-probabilities to the last digit.

    Attributes:
        finish: why it ended, in OpenAI's words.
        tokens: those that log-probabilities were given for.
        logprobs: their log-probabilities.
    """

    text: str = ""
    finish: str | None = None
    tokens: list[str] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)

    def add(self, part: dict[str, Any]) -> None:
        """Take in a choice of a response, or of a chunk of one."""
        said = part.get("message") or part.get("delta") or part
        self.text += said.get("content") or said.get("text") or ""
        self.finish = part.get("finish_reason") or self.finish
        given = part.get("logprobs") or {}
        entries = given.get("content") or []  # of a chat; completions have one list for each field
        self.tokens += [entry["token"] for entry in entries] or given.get("tokens") or []
        self.logprobs += [entry["logprob"] for entry in entries] or given.get("token_logprobs") or []


async def ask(client: httpx.AsyncClient, kind: Kind, stream: bool) -> list[Choice]:
    """All answers to a good request; to a bad one, which must be refused, none.

    Raises:
        RuntimeError: a response that is neither the answer nor the expected refusal.
    """
    if kind.refused is not None:
        content = kind.body if isinstance(kind.body, bytes) else json.dumps(kind.body).encode()
        response = await client.post(kind.path, content=content, headers=_JSON)
        if response.status_code != 400 or kind.refused not in response.text:
            raise RuntimeError(f"{response.status_code} instead of 400 naming {kind.refused}: {response.text[:200]}")
        return []
    choices = [Choice() for _ in range(kind.choices)]
    if stream:
        await _read_stream(client, kind, choices)
    else:
        response = await client.post(kind.path, json=kind.body)
        if response.status_code != 200:
            raise RuntimeError(f"{response.status_code}: {response.text[:200]}")
        for part in response.json()["choices"]:
            choices[part["index"]].add(part)
    return choices


async def _read_stream(client: httpx.AsyncClient, kind: Kind, choices: list[Choice]) -> None:
    done = False
    async with client.stream("POST", kind.path, json={**kind.body, "stream": True}) as response:
        if response.status_code != 200:
            raise RuntimeError(f"{response.status_code} to a stream: {(await response.aread())[:200]!r}")
        async for line in response.aiter_lines():
            done = done or line == "data: [DONE]"
            if line.startswith("data: {"):
                chunk = json.loads(line[6:])
                if "error" in chunk:
                    raise RuntimeError(f"error in a stream: {line[:200]}")
                for part in chunk["choices"]:
                    choices[part["index"]].add(part)
    if not done:
        raise RuntimeError("a stream ended without [DONE]")


async def hang_up(client: httpx.AsyncClient, kind: Kind, stream: bool, seconds: float) -> bool:
    """Ask, and close the connection after ``seconds``; whether that was before the answer was complete."""
    try:
        async with asyncio.timeout(seconds):
            await ask(client, kind, stream)
    except TimeoutError:
        return True
    return False
