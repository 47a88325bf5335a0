"""The real server with the trained checkpoint: `vllm serve DIR`, no other flag, spoken to over HTTP."""

from __future__ import annotations

import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.e2e.server import TINY, Server

pytestmark = [pytest.mark.vllm, pytest.mark.engine]

MODEL = TINY
CHAT = [{"role": "user", "content": "Reverse: abcdefgh"}]


@pytest.fixture(scope="module")
def url(server: Server) -> str:
    return server.url


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
        {"policy": "prefix"},
        {"policy": "dkv", "cache_steps": 2},
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
    ({"xargs": {"policy": "fast"}}, "'d2cache', 'd2cache_light', 'full'"),
    ({"xargs": {"threshold": 0.9, "factor": 1.0}}, "d2cache_factor"),
    ({"xargs": {"trace_dir": "x"}}, "server-wide only"),
    ({"xargs": {"policy": "dual", "current_k": 4}}, "d2cache_current_k: an option of d2cache_policy 'd2cache'"),
    ({"xargs": {"cache_steps": 4}}, "the options of that policy are: d2cache_selection_sigma"),
    ({"xargs": {"decoder": "eb", "threshold": 0.9}}, "d2cache_threshold"),
    ({"xargs": {"decoder": "pc"}}, "token_frequencies"),
    ({"xargs": {"steps": 7, "window": 8}}, "d2cache_steps"),
    ({"extra": {"vllm_xargs": {"policy": "full"}}}, "valid options are d2cache_policy"),
    # Greedy decoding has no use for min_p: vLLM itself sets it to 0 there.
    ({"temperature": 1.0, "extra": {"min_p": 0.1}}, "min_p"),
    ({"extra": {"prompt_logprobs": 1}}, "prompt_logprobs"),
    ({"extra": {"bad_words": ["apple"]}}, "bad_words"),
    ({"extra": {"allowed_token_ids": [999999]}}, "allowed_token_ids"),
    ({"extra": {"use_beam_search": True}}, "use_beam_search"),
    ({"extra": {"priority": 3}}, "priority"),
    ({"extra": {"guided_json": "{}"}}, "guided_json"),
    ({"xargs": {"canvas": [5, -1]}}, "max_tokens: must be the length of d2cache_canvas, 2"),
    ({"xargs": {"canvas": [5, 6]}}, "at least one hole"),
    ({"xargs": {"report": 1}, "n": 2, "temperature": 1.0}, "d2cache_report"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 9999}, "max_tokens"),
    ({"messages": [{"role": "user", "content": "x" * 5000}]}, "context length"),
]


@pytest.mark.parametrize(("fields", "named"), BAD, ids=[named for _, named in BAD])
def test_bad_request_is_refused_by_name(client: openai.OpenAI, fields: dict[str, Any], named: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, **fields)
    assert named in str(caught.value)


def test_a_canvas_that_does_not_fit_is_refused(client: openai.OpenAI) -> None:
    # vLLM 0.31 refuses it itself, in its own words.
    with pytest.raises(openai.BadRequestError, match=r"max_tokens|requested 4090 output tokens"):
        ask(client, max_tokens=4090)


def test_disconnects_and_load_leave_the_server_well(client: openai.OpenAI) -> None:
    want = ask(client).choices[0].message.content
    abandoned = ask(client, stream=True, max_tokens=512, extra={"ignore_eos": True})
    next(iter(abandoned))
    abandoned.close()
    with ThreadPoolExecutor(12) as pool:
        options = [{"policy": "full"} if i % 2 else {} for i in range(12)]
        texts = list(pool.map(lambda o: ask(client, xargs=o).choices[0].message.content, options))
    assert texts == [want] * 12


def test_logprobs_with_the_tokens_streaming_or_not(client: openai.OpenAI) -> None:
    whole = ask(client, logprobs=True, top_logprobs=2).choices[0]
    entries = whole.logprobs.content
    assert "".join(e.token for e in entries).startswith("hgfedcba")
    assert all(len(e.top_logprobs) == 2 and e.logprob <= 0 for e in entries)
    pieces = [c.choices[0] for c in ask(client, logprobs=True, top_logprobs=2, stream=True) if c.choices]
    streamed = [e for p in pieces if p.logprobs for e in p.logprobs.content]
    assert [(e.token, e.logprob) for e in streamed] == [(e.token, e.logprob) for e in entries]
    completion = client.completions.create(model=MODEL, prompt="abc", max_tokens=6, logprobs=3)
    logprobs = completion.choices[0].logprobs
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == completion.usage.completion_tokens
    assert all(value <= 0 for value in logprobs.token_logprobs)


def test_bans_and_biases(client: openai.OpenAI, url: str) -> None:
    a, b = (
        httpx.post(f"{url}/tokenize", json={"model": MODEL, "prompt": c, "add_special_tokens": False}).json()["tokens"]
        for c in "ab"
    )
    only = ask(client, max_tokens=8, extra={"allowed_token_ids": [*a, *b], "ignore_eos": True})
    assert set(only.choices[0].message.content) <= {"a", "b"}
    assert "g" not in ask(client, extra={"bad_words": ["g"]}).choices[0].message.content
    biased = ask(client, max_tokens=8, logit_bias={str(a[0]): 100})
    assert biased.choices[0].message.content == "a" * 8
    assert ask(client, max_tokens=12, extra={"min_tokens": 12}).usage.completion_tokens == 12


def test_infill_example_keeps_what_is_given(url: str) -> None:
    example = Path(__file__).resolve().parents[2] / "examples" / "infill.py"
    done = subprocess.run([sys.executable, str(example), f"{url}/v1"], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 3
    for line in lines:
        question, _, rest = line.partition("->")
        template, answer = question.split()[-1], rest.split()[0]
        assert len(answer) == len(template), line
        assert all(t in ("_", c) for t, c in zip(template, answer, strict=True)), line


def counters(url: str) -> dict[str, float]:
    """The plugin's counters and vLLM's diffusion counters, summed over their labels."""
    found: dict[str, float] = {}
    for line in httpx.get(f"{url}/metrics").text.splitlines():
        name = line.partition("{")[0]
        if name.startswith(("vllm:diffusion", "vllm_d2cache:")) and name.endswith("_total"):
            found[name] = found.get(name, 0.0) + float(line.rpartition(" ")[2])
    return found


def test_a_report_and_the_counters_say_the_same(client: openai.OpenAI, url: str) -> None:
    before = counters(url)
    answer = ask(client, max_tokens=20, extra={"ignore_eos": True}, xargs={"report": 1, "window": 10})
    report = answer.kv_transfer_params["d2cache"]
    total = answer.usage.prompt_tokens + 20
    assert report["policy"] == "d2cache"
    assert report["tokens"] == report["steps"] == 20
    assert report["rows_refreshed"] + report["rows_saved"] == 20 * total
    assert 0 < report["saved_share"] < 1
    after = counters(url)
    grown = {name: after[name] - before.get(name, 0.0) for name in after}
    assert grown["vllm:diffusion_num_denoising_steps_total"] == 21
    assert grown["vllm:diffusion_num_canvas_positions_total"] == 21 * 20
    assert grown["vllm:diffusion_num_committed_tokens_total"] == 20
    assert grown["vllm_d2cache:steps_total"] == grown["vllm_d2cache:commits_total"] == 20
    assert grown["vllm_d2cache:rows_refreshed_total"] == report["rows_refreshed"]
    assert grown["vllm_d2cache:rows_saved_total"] == report["rows_saved"]
    assert grown["vllm_d2cache:budget_rows_used_total"] == report["rows_refreshed"] - total
    assert grown["vllm_d2cache:budget_rows_total"] >= grown["vllm_d2cache:budget_rows_used_total"]
    assert ask(client).model_extra.get("kv_transfer_params") is None


def test_vllms_own_benchmark_prints_the_right_diffusion_block(url: str) -> None:
    vllm = str(Path(sys.executable).with_name("vllm"))
    command = [
        *(vllm, "bench", "serve", "--backend", "openai", "--model", MODEL, "--base-url", url, "--ignore-eos"),
        *("--dataset-name", "random", "--random-input-len", "12", "--random-output-len", "16", "--num-prompts", "5"),
        *("--seed", "1", "--disable-tqdm"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    block = done.stdout.partition("Diffusion Decoding")[2]
    figures = dict(re.findall(r"^([A-Z][^:\n]+):\s+([\d.]+)", block, re.MULTILINE))
    assert figures["Denoising steps per canvas"] == "16.00"
    assert figures["Committed per denoising step"] == "1.00"
    assert figures["Committed tokens"] == "80"
    assert figures["Denoising steps"] == "80"
    assert figures["Canvas positions evaluated"] == str(5 * 17 * 16)
