"""A process of the server is killed. This file runs last: the shared server does not survive it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from benchmarks.load.memory import tree
from tests.e2e.server import Server, serve

pytestmark = [pytest.mark.vllm, pytest.mark.engine]

LONG = {"prompt": [7] * 500, "max_tokens": 512, "ignore_eos": True}
CHAT = {"messages": [{"role": "user", "content": "Reverse: abcdefgh"}], "max_tokens": 32}


def whole_answer(url: str) -> str:
    """How a plain request ends: its status, or the error of a connection that was closed."""
    try:
        return str(httpx.post(f"{url}/v1/completions", json=LONG, timeout=120).status_code)
    except httpx.HTTPError as error:
        return type(error).__name__


def streamed_answer(url: str) -> str:
    """How a stream ends: the error it was told, the error of a closed connection, or nothing said."""
    try:
        with httpx.stream("POST", f"{url}/v1/completions", json={**LONG, "stream": True}, timeout=120) as stream:
            if stream.status_code != 200:
                return str(stream.status_code)
            for line in stream.iter_lines():
                if line.startswith('data: {"error"'):
                    return str(json.loads(line[6:])["error"]["code"])
    except httpx.HTTPError as error:
        return type(error).__name__
    return "complete"


def kill(server: Server, process: str) -> None:
    """Kill a process of the server; requests under way must end as errors, and then the server itself."""
    processes = tree(server.process.pid)
    (victim,) = (pid for pid, name in processes.items() if name == process)
    with ThreadPoolExecutor(2) as pool:
        asked: list[Future[str]] = [pool.submit(ask, server.url) for ask in (whole_answer, streamed_answer)]
        time.sleep(2)
        assert not any(future.done() for future in asked), [future.result() for future in asked if future.done()]
        os.kill(victim, signal.SIGKILL)
        ends = [future.result(timeout=90) for future in asked]
    errors = {"500", "502", "503", "RemoteProtocolError", "ReadError", "ConnectError"}
    assert set(ends) <= errors, ends
    try:
        code = server.process.wait(60)
    except subprocess.TimeoutExpired:
        pytest.fail("the server goes on without an engine: a supervisor would not restart it")
    # As vLLM ends it, whatever the model: docs/deploy.md tells operators to restart always, not on failure alone.
    assert code == 0
    assert not server.healthy
    assert "EngineDeadError" in server.log or "died" in server.log
    deadline = time.monotonic() + 60
    while left := {pid: name for pid, name in processes.items() if Path(f"/proc/{pid}").exists()}:
        assert time.monotonic() < deadline, f"processes are left behind: {left}"
        time.sleep(0.2)


def test_a_killed_worker_ends_requests_and_the_server_and_a_new_one_serves(server: Server, tmp_path: Path) -> None:
    kill(server, "Worker")
    port = int(server.url.rpartition(":")[2])
    with serve(tmp_path / "log", port=port) as again:
        answer = httpx.post(f"{again.url}/v1/chat/completions", json=CHAT, timeout=120).json()
        assert answer["choices"][0]["message"]["content"] == "hgfedcba"
        kill(again, "EngineCore")
