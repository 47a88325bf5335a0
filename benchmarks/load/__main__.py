"""Load with everything that clients do: mixed requests, aborts, bad requests and stops, against a real server.

    python -m benchmarks.load --requests 2000 --concurrency 64 --out load.json

Starts `vllm serve models/tiny-llada` (or takes --url), asks every distinct request alone, then sends --requests of
them at --concurrency in random order, some of which hang up mid-way or are not acceptable. Each answer is compared with
that of the same request alone. Afterwards the server must hold no request and no KV block, and its memory must not have
grown. Exit status 1 if any of this is not so. Everything is bounded: requests, concurrency, each request's time.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from benchmarks.machine import machine

REQUEST_SECONDS = 300.0
IDLE_SECONDS = 30.0
MOST_GROWTH = 0.02  # of the memory after warm-up


@dataclass(frozen=True)
class Kind:
    """A distinct request.

    Attributes:
        refused: what the 400 must name; None for a request that is answered.
    """

    body: dict[str, Any]
    path: str = "/v1/chat/completions"
    refused: str | None = None


@dataclass
class Outcome:
    """What happened to all requests, and the state of the server around them."""

    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    tokens: int = 0


def kinds(rng: random.Random, count: int) -> list[Kind]:
    """Distinct requests: greedy and sampled, policies and rules, stops, canvases of 1 to 96 positions; and bad ones."""
    options: list[dict[str, Any]] = [
        {},
        {"d2cache_policy": "full"},
        {"d2cache_threshold": 0.7},
        {"d2cache_policy": "full", "d2cache_factor": 1.0},
        {"d2cache_window": 8, "d2cache_tokens_per_step": 2},
        {"d2cache_current_k": 4, "d2cache_score": "entropy"},
        {"d2cache_confidence_memory": "latest", "d2cache_rollout_p": 0.3, "d2cache_score": "margin"},
    ]
    good = []
    for i in range(count):
        letters = "".join(rng.choices("abcdefghij", k=rng.choice([1, 5, 12, 40, 200])))
        body: dict[str, Any] = {
            "messages": [{"role": "user", "content": f"{rng.choice(['Reverse', 'Uppercase', 'Sort'])}: {letters}"}],
            "max_tokens": rng.choice([1, 2, 16, 32, 48, 96]),
            "vllm_xargs": options[i % len(options)],
        }
        if i % 3 == 1:
            body |= {"temperature": 0.9, "seed": i, "top_p": 0.9}
        if i % 5 == 2:
            body |= {"stop": ["e"]}
        if i % 5 == 3:
            body |= {"ignore_eos": True}
        if i % 7 == 4:
            body |= {"n": 2, "temperature": 1.2, "seed": i}
        good.append(Kind(body))
    text = {"messages": [{"role": "user", "content": "Reverse: abc"}]}
    bad = [
        Kind({**text, "max_tokens": 0}, refused="max_tokens"),
        Kind({**text, "max_tokens": 99999}, refused="max_tokens"),
        Kind({**text, "max_tokens": 8, "vllm_xargs": {"d2cache_nonsense": 1}}, refused="d2cache_nonsense"),
        Kind({**text, "max_tokens": 8, "vllm_xargs": {"d2cache_window": -1}}, refused="d2cache_window"),
        Kind({"prompt": "x" * 20000, "max_tokens": 8}, "/v1/completions", refused="context length"),
    ]
    return good + bad


async def ask(client: httpx.AsyncClient, kind: Kind, stream: bool) -> tuple[list[str], int]:
    """Texts of all choices and the tokens generated; of a bad request its message.

    Raises:
        RuntimeError: an answer that is neither 200 nor the expected 400.
    """
    if stream and kind.refused is None:
        return await _streamed(client, kind)
    response = await client.post(kind.path, json=kind.body)
    if kind.refused is not None:
        if response.status_code != 400 or kind.refused not in response.text:
            raise RuntimeError(f"{response.status_code} instead of 400 naming {kind.refused}: {response.text[:200]}")
        return [], 0
    if response.status_code != 200:
        raise RuntimeError(f"{response.status_code}: {response.text[:200]}")
    answer = response.json()
    return [c["message"]["content"] or "" for c in answer["choices"]], answer["usage"]["completion_tokens"]


async def _streamed(client: httpx.AsyncClient, kind: Kind) -> tuple[list[str], int]:
    texts = [""] * kind.body.get("n", 1)
    tokens = 0
    body = {**kind.body, "stream": True, "stream_options": {"include_usage": True}}
    async with client.stream("POST", kind.path, json=body) as response:
        if response.status_code != 200:
            raise RuntimeError(f"{response.status_code} to a stream")
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                chunk = json.loads(line[6:])
                if "error" in chunk:
                    raise RuntimeError(f"error in a stream: {line[:200]}")
                for choice in chunk["choices"]:
                    texts[choice["index"]] += choice["delta"].get("content") or ""
                tokens += (chunk.get("usage") or {}).get("completion_tokens", 0)
    return texts, tokens


async def hang_up(client: httpx.AsyncClient, kind: Kind, after: float) -> None:
    """Begin a stream and close the connection ``after`` seconds."""
    try:
        async with asyncio.timeout(after), client.stream("POST", kind.path, json={**kind.body, "stream": True}) as r:
            async for _ in r.aiter_lines():
                pass
    except TimeoutError:
        pass


async def load(url: str, requests: int, concurrency: int, distinct: int, seed: int) -> dict[str, Any]:
    """Run everything against a server; returns the report."""
    rng = random.Random(seed)
    outcome = Outcome()
    limits = httpx.Limits(max_connections=concurrency + 1)
    async with httpx.AsyncClient(base_url=url, timeout=REQUEST_SECONDS, limits=limits) as client:
        chosen = kinds(rng, distinct)
        alone = [(await ask(client, kind, stream=False))[0] for kind in chosen]
        # The first loaded batches make the server's memory grow to its working size.
        await _send(client, rng, chosen, alone, min(requests, 4 * concurrency), concurrency, Outcome())
        await _idle(client)
        memory = await _memory(client)
        begin = time.perf_counter()
        await _send(client, rng, chosen, alone, requests, concurrency, outcome)
        seconds = time.perf_counter() - begin
        left = await _idle(client)
        grown = (await _memory(client)) / memory - 1
    times = sorted(outcome.seconds) or [0.0]
    problems = list(outcome.wrong)
    problems += [f"after {IDLE_SECONDS:.0f} s idle the server still has {name}: {n}" for name, n in left.items() if n]
    if grown > MOST_GROWTH:
        problems.append(f"memory grew by {100 * grown:.1f} %, more than {100 * MOST_GROWTH:.0f} %")
    return {
        "requests": requests,
        "concurrency": concurrency,
        "distinct": len(chosen),
        "seed": seed,
        "seconds": round(seconds, 2),
        "outcomes": dict(sorted(outcome.counts.items())),
        "completion_tokens_per_second": round(outcome.tokens / seconds, 1),
        "latency_median_s": round(times[len(times) // 2], 3),
        "latency_p99_s": round(times[int(0.99 * (len(times) - 1))], 3),
        "memory_after_warm_up_mib": round(memory / 2**20, 1),
        "memory_growth_percent": round(100 * grown, 2),
        "left_behind": left,
        "problems": problems,
    }


async def _send(
    client: httpx.AsyncClient,
    rng: random.Random,
    chosen: list[Kind],
    alone: list[list[str]],
    requests: int,
    concurrency: int,
    outcome: Outcome,
) -> None:
    """``requests`` of the kinds in random order, ``concurrency`` at a time."""
    plan = [(rng.randrange(len(chosen)), rng.random(), rng.random()) for _ in range(requests)]
    queue = iter(plan)

    async def worker() -> None:
        for i, what, amount in queue:
            kind = chosen[i]
            if what < 0.15 and kind.refused is None:
                await hang_up(client, kind, 0.3 * amount)
                outcome.counts["hung up"] += 1
                continue
            begin = time.perf_counter()
            try:
                texts, tokens = await ask(client, kind, stream=what < 0.5)
            except (RuntimeError, httpx.HTTPError) as error:
                outcome.counts["failed"] += 1
                outcome.wrong.append(f"request {i}: {error!r}")
                continue
            outcome.counts["answered" if kind.refused is None else "refused"] += 1
            outcome.seconds.append(time.perf_counter() - begin)
            outcome.tokens += tokens
            if texts != alone[i]:
                outcome.counts["wrong"] += 1
                outcome.wrong.append(f"request {i}: {texts} instead of {alone[i]}")

    await asyncio.gather(*(worker() for _ in range(concurrency)))


async def _idle(client: httpx.AsyncClient) -> dict[str, float]:
    """Wait until nothing runs; what is left after IDLE_SECONDS."""
    deadline = time.monotonic() + IDLE_SECONDS
    while True:
        left = await _gauges(client)
        if not any(left.values()) or time.monotonic() > deadline:
            return left
        await asyncio.sleep(0.2)


async def _gauges(client: httpx.AsyncClient) -> dict[str, float]:
    """Running and waiting requests and the share of KV blocks in use, as the server's own metrics say."""
    text = (await client.get("/metrics")).text
    names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
    found = {}
    for name in names:
        values = re.findall(rf"^vllm:{name}\{{[^}}]*\}} (\S+)$", text, re.MULTILINE)
        if not values:
            raise RuntimeError(f"/metrics has no vllm:{name}")
        found[name] = sum(map(float, values))
    return found


async def _memory(client: httpx.AsyncClient) -> float:
    """Resident bytes of the server and all of its processes."""
    port = str(client.base_url.port)
    roots = [p for p in _processes() if p[2] and "serve" in p[2] and port in p[2]]
    if not roots:
        raise RuntimeError(f"no `vllm serve ... --port {port}` runs on this machine")
    members = {roots[0][0]}
    for _ in range(4):
        members |= {pid for pid, parent, _ in _processes() if parent in members}
    total = 0
    for pid in members:
        status = Path(f"/proc/{pid}/status").read_text()
        total += 1024 * int((re.search(r"VmRSS:\s+(\d+)", status) or [0, 0])[1])
    return float(total)


def _processes() -> list[tuple[int, int, list[str]]]:
    """(pid, parent, command line) of each process."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
            command = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue  # it has ended
        found.append((int(entry.name), parent, command))
    return found


def main() -> int:
    """Run and report; 1 if there was a problem."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--distinct", type=int, default=60, help="good requests to draw from")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--url", help="a server on this machine, without /v1 (default: start one)")
    parser.add_argument("--out", type=Path, help="also write the report as JSON")
    args = parser.parse_args()
    if args.url:
        report = asyncio.run(load(args.url, args.requests, args.concurrency, args.distinct, args.seed))
    else:
        from tests.e2e.server import serve

        with tempfile.TemporaryDirectory() as directory, serve(Path(directory, "log")) as server:
            report = asyncio.run(load(server.url, args.requests, args.concurrency, args.distinct, args.seed))
    report["machine"] = machine()
    print(json.dumps(report, indent=1))
    if args.out:
        args.out.write_text(json.dumps(report, indent=1) + "\n")
    return 1 if report["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())
