"""Start stock `vllm serve` on a checkpoint, wait until it answers, and stop it; for the demo and the benchmarks."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.rule import Rule

ROOT = Path(__file__).resolve().parent.parent
STARTUP_SECONDS = 420


class ServerError(Exception):
    """The server did not start or stopped. The message says why."""


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def settings() -> dict[str, str]:
    """Environment variables of the server that the user has not set."""
    ours = {"VLLM_NO_USAGE_STATS": "1"}
    if not Path("/proc/driver/nvidia/version").exists():
        ours["VLLM_CPU_KVCACHE_SPACE"] = "1"  # GiB; the default of vLLM's CPU build is half the machine's memory
    return {name: value for name, value in ours.items() if name not in os.environ}


def serve_command(model: str, port: int, traces: Path, arguments: tuple[str, ...]) -> list[str]:
    """The command line. The trace directory is only there for the figures that are printed afterwards."""
    config = json.dumps({"d2cache": {"trace_dir": str(traces)}})
    return ["vllm", "serve", model, *arguments, "--port", str(port), "--additional-config", config]


def healthy(url: str) -> bool:
    """Whether the server answers."""
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=2) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def wait_until_ready(process: subprocess.Popen[bytes], url: str, console: Console) -> float:
    """Wait for /health; returns the seconds it took."""
    begin = time.monotonic()
    with console.status("") as status:
        while not healthy(url):
            seconds = time.monotonic() - begin
            if process.poll() is not None:
                raise ServerError(f"the server stopped with exit code {process.returncode} before it was ready")
            if seconds > STARTUP_SECONDS:
                raise ServerError(f"the server was not ready after {STARTUP_SECONDS} s")
            status.update(f"vLLM starts (about a minute on two CPU cores) ... {seconds:.0f} s")
            time.sleep(0.5)
    return time.monotonic() - begin


def stop(process: subprocess.Popen[bytes], patience: float) -> None:
    """Ask the server to end as Ctrl-C does; what is left of its process group after `patience` seconds is killed."""
    try:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired, KeyboardInterrupt):
            process.wait(patience)
    finally:
        with contextlib.suppress(ProcessLookupError):  # engine and worker processes that outlived the server
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@contextlib.contextmanager
def ended_in_order() -> Iterator[None]:
    """SIGTERM ends the block as Ctrl-C does; without that nobody would stop the server. Main thread only."""

    def end(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def print_log(log: Path, console: Console) -> None:
    """The end of the server's log, and before it the errors: the cause is often further up, in another process."""
    lines = log.read_text(errors="replace").splitlines()
    found = (line for line in lines if re.search(r"\b\w+(Error|Exception): ", line) and " WARNING " not in line)
    errors = dict.fromkeys(found)
    for title, part in (("errors in the server's log", list(errors)[-12:]), ("end of the server's log", lines[-40:])):
        console.print(Rule(title, style="red", align="left"))
        console.print("\n".join(part), markup=False, highlight=False, soft_wrap=True)


def ask(url: str, question: str) -> str:
    """The answer to a chat question, from a server at ``url``."""
    body = {"messages": [{"role": "user", "content": question}], "max_tokens": 32}
    request = urllib.request.Request(
        f"{url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as response:
        return str(json.load(response)["choices"][0]["message"]["content"])


@contextlib.contextmanager
def server(
    model: str,
    traces: Path,
    console: Console,
    arguments: tuple[str, ...] = (),
    executable: Path | None = None,
    cwd: Path = ROOT,
) -> Iterator[str]:
    """A running server; yields its base URL. Prints the end of its log if anything fails.

    Args:
        model: checkpoint, relative to ``cwd`` or absolute.
        traces: directory for traces and the server's log.
        arguments: further words of the command line.
        executable: the command `vllm`; None = that of the running Python's environment.
    """
    port = free_port()
    command, env = serve_command(model, port, traces, arguments), settings()
    names = [f"{name}={value}" for name, value in env.items() if name == "VLLM_CPU_KVCACHE_SPACE"]
    shown = " ".join([*names, *command[:-2]])
    console.print(Rule("server", align="left"))
    console.print(f"$ [bold]{escape(shown)}[/bold]")
    console.print("[dim](plus a trace directory, from which the tables take steps and rows)[/dim]")
    executable = executable or Path(sys.executable).parent / command[0]
    if not executable.exists():
        raise ServerError(f"{executable} is missing; build the environment with `make env`")
    log = traces / "server.log"
    with log.open("wb") as sink:
        process = subprocess.Popen(
            [str(executable), *command[1:]],
            cwd=cwd,
            env={**os.environ, **env},
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that Ctrl-C reaches the caller alone, who then ends the server in order
        )
    patience = 3.0  # a server that is still starting does not heed the signal
    try:
        url = f"http://127.0.0.1:{port}"
        with ended_in_order():
            console.print(f"ready after {wait_until_ready(process, url, console):.0f} s: {url}/v1")
            patience = 20.0
            yield url
    except Exception:
        print_log(log, console)
        raise
    finally:
        with console.status("stopping the server ..."):
            stop(process, patience)
