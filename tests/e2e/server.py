"""A real `vllm serve` in a process of its own."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx

TINY = str(Path(__file__).resolve().parents[2] / "models" / "tiny-llada")
# Of this environment, or of another one where the clients have one of their own (make clients).
VLLM = os.environ.get("SERVER_COMMAND", str(Path(sys.executable).with_name("vllm")))
_STARTUP_SECONDS = 400


@dataclass(frozen=True)
class Server:
    """A running server."""

    url: str  # without /v1
    process: subprocess.Popen[bytes]
    log_file: Path

    @property
    def log(self) -> str:
        """What it has printed so far."""
        return self.log_file.read_text(errors="replace")

    @property
    def healthy(self) -> bool:
        """Whether it answers."""
        return healthy(self.url)


def healthy(url: str) -> bool:
    """Whether a server answers there."""
    try:
        return httpx.get(f"{url}/health", timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def serve(
    log_file: Path, *flags: str, model: str = TINY, port: int | None = None, patience: float = _STARTUP_SECONDS
) -> Iterator[Server]:
    """Start `vllm serve MODEL` with these flags, wait until it answers, and end it as Ctrl-C does."""
    port = port or free_port()
    environment = {k: v for k, v in os.environ.items() if k != "VLLM_ENABLE_V1_MULTIPROCESSING"}
    command = [VLLM, "serve", model, "--port", str(port), *flags]
    with log_file.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environment)
    server = Server(f"http://127.0.0.1:{port}", process, log_file)
    try:
        deadline = time.monotonic() + patience
        while not server.healthy:
            assert process.poll() is None, f"the server died:\n{server.log[-4000:]}"
            assert time.monotonic() < deadline, f"no answer:\n{server.log[-4000:]}"
            time.sleep(1)
        yield server
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
