"""The engine's process is killed. This file runs last: the shared server does not survive it."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from pathlib import Path

import httpx
import pytest

from tests.e2e.server import Server

pytestmark = [pytest.mark.vllm, pytest.mark.engine]


def engine_process(server: Server) -> int:
    """The child of the server that is the engine core."""
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
            command = (entry / "cmdline").read_text()
        except OSError:
            continue
        if parent == server.process.pid and "EngineCore" in command:
            return int(entry.name)
    raise AssertionError("no engine process")


def test_a_killed_engine_ends_requests_and_the_server(server: Server) -> None:
    statuses: list[int | str] = []

    def ask() -> None:
        body = {"prompt": [7] * 500, "max_tokens": 512, "ignore_eos": True}
        try:
            statuses.append(httpx.post(f"{server.url}/v1/completions", json=body, timeout=120).status_code)
        except httpx.HTTPError as error:
            statuses.append(type(error).__name__)

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join(2)
    assert thread.is_alive(), statuses
    os.kill(engine_process(server), signal.SIGKILL)
    thread.join(60)
    assert not thread.is_alive(), "the request hangs"
    (status,) = statuses
    assert isinstance(status, str) or status >= 500
    try:
        server.process.wait(60)
    except subprocess.TimeoutExpired:
        pytest.fail("the server goes on without an engine: a supervisor would not restart it")
    assert not server.healthy
    assert "EngineDeadError" in server.log or "died" in server.log
