"""The real server with the trained checkpoint: `vllm serve DIR`, no other flag, spoken to over HTTP."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

pytestmark = [pytest.mark.vllm, pytest.mark.engine]

MODEL = str(Path(__file__).resolve().parents[2] / "models" / "tiny-llada")
CHAT = [{"role": "user", "content": "Reverse: abcdefgh"}]


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log"
    environment = {k: v for k, v in os.environ.items() if k != "VLLM_ENABLE_V1_MULTIPROCESSING"}
    command = [str(Path(sys.executable).with_name("vllm")), "serve", MODEL, "--port", str(port)]
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environment)
    base = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 400
        while not _healthy(base):
            assert process.poll() is None, f"the server died:\n{log.read_text()[-4000:]}"
            assert time.monotonic() < deadline, f"no answer:\n{log.read_text()[-4000:]}"
            time.sleep(1)
        yield base
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()


def _healthy(base: str) -> bool:
    try:
        return httpx.get(f"{base}/health", timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


@pytest.fixture(scope="module")
def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=300)


def ask(client: openai.OpenAI, **fields: Any) -> Any:
    """A chat request with these fields; ``xargs`` by plain option name."""
    xargs = {f"d2cache_{k}": v for k, v in fields.pop("xargs", {}).items()}
    extra = {**fields.pop("extra", {}), **({"vllm_xargs": xargs} if xargs else {})}
    return client.chat.completions.create(
        **{"model": MODEL, "messages": CHAT, "max_tokens": 32, **fields}, extra_body=extra
    )


def test_chat_answers_and_counts(client: openai.OpenAI) -> None:
    response = ask(client)
    usage = response.usage
    assert response.choices[0].message.content == "hgfedcba"
    assert response.choices[0].finish_reason == "stop"
    assert usage.completion_tokens <= 32
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


def test_canvas_is_256_when_absent(client: openai.OpenAI) -> None:
    chat = ask(client, max_tokens=openai.omit, extra={"ignore_eos": True}, xargs={"threshold": 0.5})
    text = client.completions.create(
        model=MODEL, prompt="abc", extra_body={"ignore_eos": True, "vllm_xargs": {"d2cache_threshold": 0.5}}
    )
    assert chat.usage.completion_tokens == text.usage.completion_tokens == 256
    assert chat.choices[0].finish_reason == "length"


def test_stream_is_the_same_text_in_pieces(client: openai.OpenAI) -> None:
    whole = ask(client).choices[0].message.content
    chunks = list(ask(client, stream=True, stream_options={"include_usage": True}))
    pieces = [c.choices[0].delta.content for c in chunks if c.choices and c.choices[0].delta.content]
    assert "".join(pieces) == whole
    assert len(pieces) > 1
    assert chunks[-1].usage.completion_tokens > 0


def test_policies_and_options_per_request(client: openai.OpenAI) -> None:
    for options in (
        {"policy": "full"},
        {"threshold": 0.9},
        {"window": 8, "current_k": 4},
        {"factor": 1.0},
        {"decoder": "eb"},
    ):
        assert ask(client, xargs=options).choices[0].message.content == "hgfedcba", options


def test_n_and_seed(client: openai.OpenAI) -> None:
    # A question the model is unsure of, so that samples differ.
    unsure = [{"role": "user", "content": "Tell me about apples and shells."}]
    first = ask(client, messages=unsure, n=3, temperature=2.0, seed=7)
    again = ask(client, messages=unsure, n=3, temperature=2.0, seed=7)
    texts = [c.message.content for c in first.choices]
    assert texts == [c.message.content for c in again.choices]
    assert len(set(texts)) > 1


def test_stop_string_and_stop_token(client: openai.OpenAI, url: str) -> None:
    stopped = ask(client, stop=["e"])
    assert stopped.choices[0].message.content == "hgf"
    token = httpx.post(f"{url}/tokenize", json={"model": MODEL, "prompt": "e", "add_special_tokens": False}).json()
    by_token = ask(client, extra={"stop_token_ids": token["tokens"]})
    assert by_token.choices[0].message.content in ("hgf", "hgfe")
    assert by_token.choices[0].finish_reason == "stop"


BAD: list[tuple[dict[str, Any], str]] = [
    ({"xargs": {"windw": 8}}, "d2cache_windw"),
    ({"xargs": {"window": -1}}, "d2cache_window"),
    ({"xargs": {"policy": "fast"}}, "'d2cache', 'full'"),
    ({"xargs": {"threshold": 0.9, "factor": 1.0}}, "d2cache_factor"),
    ({"xargs": {"trace_dir": "x"}}, "server-wide only"),
    ({"xargs": {"decoder": "eb", "threshold": 0.9}}, "d2cache_threshold"),
    ({"xargs": {"decoder": "pc"}}, "token_frequencies"),
    ({"xargs": {"steps": 7, "window": 8}}, "d2cache_steps"),
    ({"extra": {"vllm_xargs": {"policy": "full"}}}, "valid options are d2cache_policy"),
    ({"logprobs": True}, "logprobs"),
    ({"response_format": {"type": "json_object"}}, "structured_outputs"),
    ({"presence_penalty": 0.5}, "presence_penalty"),
    ({"logit_bias": {"5": 3.0}}, "logit_bias"),
    ({"extra": {"min_tokens": 4}}, "min_tokens"),
    # Greedy decoding has no use for min_p: vLLM itself sets it to 0 there.
    ({"temperature": 1.0, "extra": {"min_p": 0.1}}, "min_p"),
    ({"extra": {"repetition_penalty": 1.2}}, "repetition_penalty"),
    ({"extra": {"bad_words": ["x"]}}, "bad_words"),
    ({"extra": {"allowed_token_ids": [1]}}, "allowed_token_ids"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 4090}, "max_tokens"),
    ({"max_tokens": 9999}, "max_tokens"),
    ({"messages": [{"role": "user", "content": "x" * 5000}]}, "context length"),
]


@pytest.mark.parametrize(("fields", "named"), BAD, ids=[named for _, named in BAD])
def test_bad_request_is_refused_by_name(client: openai.OpenAI, fields: dict[str, Any], named: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, **fields)
    assert named in str(caught.value)


def test_completions_refuse_logprobs(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="logprobs"):
        client.completions.create(model=MODEL, prompt="abc", max_tokens=8, logprobs=2)


def test_disconnects_and_load_leave_the_server_well(client: openai.OpenAI) -> None:
    want = ask(client).choices[0].message.content
    abandoned = ask(client, stream=True, max_tokens=512, extra={"ignore_eos": True})
    next(iter(abandoned))
    abandoned.close()
    with ThreadPoolExecutor(12) as pool:
        options = [{"policy": "full"} if i % 2 else {} for i in range(12)]
        texts = list(pool.map(lambda o: ask(client, xargs=o).choices[0].message.content, options))
    assert texts == [want] * 12
