"""Every example that can run here, run as its first lines say, against the real server."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import yaml

from tests.e2e.server import Server, free_port, healthy

pytestmark = [pytest.mark.vllm, pytest.mark.engine]

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
CHAT = [{"role": "user", "content": "Reverse: abcdefgh"}]


def run(*command: str, timeout: float = 120) -> str:
    """What a command prints; it must succeed."""
    environment = {k: v for k, v in os.environ.items() if k != "VLLM_ENABLE_V1_MULTIPROCESSING"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def example(name: str, *arguments: str) -> str:
    return run(sys.executable, str(EXAMPLES / name), *arguments)


def test_curl(server: Server) -> None:
    if shutil.which("curl") is None:
        pytest.skip("no curl on this machine")
    out = run("sh", str(EXAMPLES / "chat.sh"), server.url)
    assert '"object":"chat.completion"' in out
    assert '"finish_reason":"stop"' in out
    assert out.count("data: ") >= 3
    assert "data: [DONE]" in out
    assert "d2cache_windw: unknown request option" in out


def test_openai_client(server: Server) -> None:
    out = example("client.py", f"{server.url}/v1")
    assert out.startswith("streaming, d2Cache: mae")
    assert len(out.splitlines()) == 4


def test_openai_async_client(server: Server) -> None:
    lines = example("async_client.py", f"{server.url}/v1").splitlines()
    assert len(lines) == 4
    assert "Sort the digits: 40219653 -> 01234569" in lines
    assert "Count from 12 to 34 by 2. -> 12,14,16,18,20,22,24,26,28,30,32,34." in lines


def test_structured_output(server: Server) -> None:
    lines = example("structured_output.py", f"{server.url}/v1").splitlines()
    assert re.fullmatch(r"a class: +Sum\(left=\d+, right=\d+, sure=(True|False)\)", lines[0])
    assert re.fullmatch("choice: +(up|down|stay where you are)", lines[1])
    assert re.fullmatch(r"regex: +[a-h]{4}-\d{2}", lines[2])
    assert re.match("grammar: +[abc](, [abc])*", lines[3])


def test_watching_the_canvas(server: Server) -> None:
    """It ends with the answer to the same request without snapshots."""
    lines = example("watch_canvas.py", f"{server.url}/v1").splitlines()
    question = {"messages": [{"role": "user", "content": "Count from 12 to 34 by 2."}], "max_tokens": 48}
    response = httpx.post(f"{server.url}/v1/chat/completions", json=question, timeout=120)
    answer = response.json()["choices"][0]["message"]["content"]
    assert answer.startswith("12,14,16")
    assert lines[-2:] == [answer, f"certain so far: {answer}"]


def test_comparison_of_policies(server: Server) -> None:
    lines = example("compare_policies.py", f"{server.url}/v1").splitlines()
    assert len(lines) == 4
    assert lines[0].startswith("full                     4 of 4 as full")
    assert all(re.search(r"[0-4] of 4 as full, \d+\.\d\d s$", line) for line in lines)


def test_offline_batch() -> None:
    """Its own engine, as a newcomer starts it."""
    out = run(sys.executable, str(EXAMPLES / "offline.py"), timeout=400)
    assert "Uppercase: diffusion -> DIFFUSION" in out
    assert out.count(" -> ") == 3


# --- deployment ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    return yaml.safe_load((EXAMPLES / "deploy" / "compose.yaml").read_text())


def test_compose_runs_two_like_replicas_on_gpus_of_their_own(compose: dict[str, Any]) -> None:
    a, b = compose["services"]["replica-a"], compose["services"]["replica-b"]
    devices = [s.pop("deploy")["resources"]["reservations"]["devices"][0]["device_ids"] for s in (a, b)]
    assert devices == [["0"], ["1"]]
    assert a == b
    assert set(compose["services"]["router"]["depends_on"]) == {"replica-a", "replica-b"}
    for service in compose["services"].values():
        for volume in service["volumes"]:
            source = volume.split(":", 1)[0]
            assert source.startswith("${MODEL_DIR") or (EXAMPLES / "deploy" / source).is_file()
    build = a["build"]
    assert (EXAMPLES / "deploy" / build["context"] / build["dockerfile"]).is_file()


def test_compose_starts_vllm_with_flags_it_knows(compose: dict[str, Any]) -> None:
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    model, *flags = compose["services"]["replica-a"]["command"]
    args = EngineArgs.add_cli_args(FlexibleArgumentParser()).parse_args(flags)
    assert (model, args.served_model_name, args.max_model_len) == ("/model", ["llada"], 4096)


def test_kubernetes_starts_vllm_with_the_same_flags(compose: dict[str, Any]) -> None:
    manifests = yaml.safe_load_all((EXAMPLES / "deploy" / "kubernetes.yaml").read_text())
    (deployment,) = (manifest for manifest in manifests if manifest["kind"] == "Deployment")
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    assert container["args"] == compose["services"]["replica-a"]["command"]


@contextlib.contextmanager
def router(name: str, replicas: tuple[str, str], tmp_path: Path) -> Iterator[str]:
    """The URL of nginx with that configuration of examples/deploy, before two replicas (host:port)."""
    nginx = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
    if nginx is None:
        pytest.skip("no nginx on this machine")
    port = free_port()
    config = (EXAMPLES / "deploy" / name).read_text()
    for old, new in {
        "replica-a:8000": replicas[0],
        "replica-b:8000": replicas[1],
        "listen 8000": f"listen 127.0.0.1:{port}",
        "/tmp/": f"{tmp_path}/",
    }.items():
        assert old in config
        config = config.replace(old, new)
    (tmp_path / "nginx.conf").write_text(config)
    tmp_path.chmod(0o755)
    process = subprocess.Popen([nginx, "-e", "stderr", "-c", str(tmp_path / "nginx.conf"), "-g", "daemon off;"])
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 60
        while not healthy(url):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        yield url
    finally:
        process.terminate()
        process.wait(20)


def test_the_router_streams_and_passes_by_a_replica_that_is_down(server: Server, tmp_path: Path) -> None:
    replicas = (server.url.removeprefix("http://"), f"127.0.0.1:{free_port()}")  # nobody listens there
    with router("nginx.conf", replicas, tmp_path) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120)
        model = client.models.list().data[0].id

        def ask(_: int) -> str | None:
            answer = client.chat.completions.create(model=model, messages=CHAT, max_tokens=32)  # type: ignore[arg-type]
            return answer.choices[0].message.content

        with ThreadPoolExecutor(6) as pool:
            assert list(pool.map(ask, range(6))) == ["hgfedcba"] * 6
        fields = {"model": model, "messages": CHAT, "max_tokens": 256, "stream": True, "ignore_eos": True}
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=fields, timeout=120) as stream:
            times = [time.monotonic() for line in stream.iter_lines() if line.startswith("data: ")]
        assert times[-1] - times[0] > 0.2, "the router held the stream back"


@contextlib.contextmanager
def name_server(name: str) -> Iterator[tuple[str, ThreadingHTTPServer]]:
    """A replica that answers everything with its name."""

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(name)))
            self.end_headers()
            self.wfile.write(name.encode())

        def log_message(self, *_: Any) -> None:
            pass

    replica = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=replica.serve_forever, daemon=True).start()
    try:
        yield f"127.0.0.1:{replica.server_port}", replica
    finally:
        replica.shutdown()
        replica.server_close()


def test_a_session_stays_with_its_replica(tmp_path: Path) -> None:
    with (
        name_server("a") as (a, _),
        name_server("b") as (b, other),
        router("nginx-sessions.conf", (a, b), tmp_path) as url,
    ):

        def ask(session: str | None) -> str:
            headers = {} if session is None else {"X-Session-Id": session}
            answer = httpx.get(f"{url}/v1/models", headers=headers, timeout=60)
            assert answer.status_code == 200
            return answer.text

        sessions = [f"session {i}" for i in range(24)]
        homes = [ask(session) for session in sessions]
        assert set(homes) == {"a", "b"}
        assert [ask(session) for session in sessions] == homes
        assert {ask(None) for _ in range(24)} == {"a", "b"}, "without a session all go to one"
        other.shutdown()
        other.server_close()
        assert {ask(session) for session in sessions} == {"a"}, "a session is lost with its replica"


def test_the_start_up_log_has_the_plan_and_each_changed_default(server: Server) -> None:
    lines = [line.split("vllm-d2cache ", 1)[1] for line in server.log.splitlines() if "vllm-d2cache " in line]
    plan = [line for line in lines if not line.startswith("changed a default: ")]
    names = [line.split(":")[0] for line in plan]
    assert names == [
        "model", "decoding unless a request says otherwise", "budget", "batch", "KV cache",
        "memory of running requests", "memory of a step, beside the forward pass", "execution", "scheduling", "traces",
    ]  # fmt: skip
    assert any(line.startswith("changed a default: execution is eager (") for line in lines)
    assert "policy d2cache" in plan[1]
