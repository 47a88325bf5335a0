"""The load itself: every request alone, then all of them at once, and a look at what the server still holds."""

from __future__ import annotations

import asyncio
import random
import re
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import Any

import httpx

from benchmarks.load.client import Choice, ask, hang_up
from benchmarks.load.memory import MIB, MemoryLog
from benchmarks.load.mix import COMPLETIONS, Kind, kinds
from vllm_d2cache.requests.resolve import DECODERS

REQUEST_SECONDS = 300.0
IDLE_SECONDS = 30.0
SAMPLE_SECONDS = 1.0
# Of the memory before a load. A leak takes as much in each load of the same size; an allocator that has not yet come to
# its working size takes less and less. So it is a leak if no load of so many stays below.
MOST_GROWTH = 0.02
MOST_LOADS = 4


@dataclass(frozen=True)
class Plan:
    """What is sent to which server.

    Attributes:
        distinct: good requests to draw from.
        places: how many requests the server runs at once (``--max-num-seqs``).
        decoders: which of them the server has; pc needs a table.
    """

    requests: int
    concurrency: int
    distinct: int
    seed: int
    places: int
    decoders: tuple[str, ...] = DECODERS


@dataclass
class Outcome:
    """What happened to the requests.

    Attributes:
        counts: requests by what became of them.
        by_trait: the same, for the requests of each trait.
        problems: what should not have happened.
    """

    counts: Counter[str] = field(default_factory=Counter)
    by_trait: defaultdict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    problems: list[str] = field(default_factory=list)

    def count(self, what: str, traits: tuple[str, ...]) -> None:
        """Add a request."""
        self.counts[what] += 1
        for trait in traits:
            self.by_trait[trait][what] += 1

    def compare(self, name: str, kind: Kind, got: list[Choice], want: list[Choice]) -> None:
        """Count an answered request as right or wrong."""
        if got == want:
            self.count("refused" if kind.refused else "answered", kind.traits)
        else:
            self.count("wrong", kind.traits)
            self.problems.append(f"{name} {kind.traits}: {got} instead of {want}")


class Load:
    """A server under load.

    Args:
        client: talks to the server.
        chosen: the requests to draw from.
        alone: what each of them is answered alone.
        rng: decides what is sent when, and what hangs up.
    """

    def __init__(
        self, client: httpx.AsyncClient, chosen: list[Kind], alone: list[list[Choice]], rng: random.Random
    ) -> None:
        self._client, self._chosen, self._alone, self._rng = client, chosen, alone, rng

    async def send(self, requests: int, concurrency: int) -> Outcome:
        """``requests`` of the kinds in random order, ``concurrency`` at a time."""
        outcome = Outcome()
        rng = self._rng
        plan = [(rng.randrange(len(self._chosen)), rng.random() < 0.5, self._patience()) for _ in range(requests)]
        queue = iter(plan)

        async def worker() -> None:
            for number, stream, patience in queue:
                await self._one(outcome, number, stream, patience)

        await asyncio.gather(*(worker() for _ in range(concurrency)))
        return outcome

    def _patience(self) -> float | None:
        """Seconds after which the client hangs up: at once, or while the answer is being written; mostly never."""
        if self._rng.random() > 0.15:
            return None
        return self._rng.uniform(0.0, self._rng.choice([0.3, 8.0]))

    async def _one(self, outcome: Outcome, number: int, stream: bool, patience: float | None) -> None:
        kind, name = self._chosen[number], f"request {number}"
        try:
            if patience is not None and kind.refused is None:
                early = await hang_up(self._client, kind, stream, patience)
                outcome.count("hung up" if early else "answered first", kind.traits)
                return
            got = await ask(self._client, kind, stream)
        except (RuntimeError, httpx.HTTPError) as error:
            outcome.count("failed", kind.traits)
            outcome.problems.append(f"{name} {kind.traits}: {error!r}")
            return
        outcome.compare(name, kind, got, self._alone[number])


async def load(url: str, pid: int, plan: Plan) -> dict[str, Any]:
    """Run everything against a server; returns the report.

    Args:
        url: of the server, without /v1.
        pid: its process on this machine.
    """
    requests, concurrency, places = plan.requests, plan.concurrency, plan.places
    rng = random.Random(plan.seed)
    memory = MemoryLog(pid)
    limits = httpx.Limits(max_connections=concurrency + 1)
    async with httpx.AsyncClient(base_url=url, timeout=REQUEST_SECONDS, limits=limits) as client:
        chosen = kinds(rng, plan.distinct, plan.decoders)
        watch = asyncio.create_task(memory.watch(SAMPLE_SECONDS))
        alone = [await ask(client, kind, stream=False) for kind in chosen]
        under = Load(client, chosen, alone, rng)
        # The first loaded batches make the server's memory grow to its working size, more slowly each time.
        warm_up = await under.send(20 * concurrency, concurrency)
        await _idle(client)
        problems, growths = list(warm_up.problems), []
        while not growths or (growths[-1] > MOST_GROWTH and len(growths) < MOST_LOADS):
            before, begin = memory.sample(), len(memory.samples)
            started = time.perf_counter()
            outcome = await under.send(requests, concurrency)
            seconds = time.perf_counter() - started
            left = await _idle(client)
            after, end = memory.sample(), len(memory.samples)
            growths.append(after.total() / before.total() - 1)
            problems += outcome.problems
            if outcome.counts.total() != requests:
                problems.append(f"{requests} requests were sent, and {outcome.counts.total()} accounted for")
            kept = ((name, n) for name, n in left.items() if n)
            problems += [f"after {IDLE_SECONDS:.0f} s idle the server still has {name}: {n}" for name, n in kept]
        filled = await _fill(client, places)
        watch.cancel()
    if filled != places:
        problems.append(f"{filled} requests run at once afterwards; the server has {places} places")
    if growths[-1] > MOST_GROWTH:
        each = ", ".join(f"{100 * grown:.1f} %" for grown in growths)
        problems.append(f"memory grew by {each} in loads of the same size, always by more than {MOST_GROWTH:.0%}")
    return {
        "requests": requests,
        "concurrency": concurrency,
        "distinct": len(chosen),
        "seed": plan.seed,
        "seconds": round(seconds, 1),
        "outcomes": dict(sorted(outcome.counts.items())),
        "by_trait": {trait: dict(sorted(counts.items())) for trait, counts in sorted(outcome.by_trait.items())},
        "left_behind": left,
        "places": {"all": places, "filled_afterwards": filled},
        "memory": {
            "before_load_mib": _mib(before),
            "after_load_mib": _mib(after),
            "growth_percent": round(100 * growths[-1], 2),
            "loads": len(growths),
            "peak_mib": round(max(seen.total() for _, seen in memory.samples[begin:end]) / MIB, 1),
            "load_begins_s": round(memory.samples[begin - 1][0], 1),
            "load_ends_s": round(memory.samples[end - 1][0], 1),
            "samples": _columns(memory),
        },
        "problems": problems,
    }


def _columns(memory: MemoryLog) -> dict[str, list[float]]:
    """The samples as lists: seconds, and MiB of each process."""
    names = dict.fromkeys(name for _, seen in memory.samples for name in seen)
    columns = {name: [round(seen[name] / MIB, 1) for _, seen in memory.samples] for name in names}
    return {"seconds": [round(at, 1) for at, _ in memory.samples], **columns}


def _mib(seen: Counter[str]) -> dict[str, float]:
    return {name: round(size / MIB, 1) for name, size in seen.items()}


async def _idle(client: httpx.AsyncClient) -> dict[str, float]:
    """Wait until nothing runs; what is left after IDLE_SECONDS."""
    deadline = time.monotonic() + IDLE_SECONDS
    while True:
        left = await _gauges(client)
        if not any(left.values()) or time.monotonic() > deadline:
            return left
        await asyncio.sleep(0.2)


async def _fill(client: httpx.AsyncClient, places: int) -> int:
    """The most requests that run when as many arrive as there are places. Had a slot been lost, the worker would fail.

    They are short enough to be admitted in one step, whatever the token budget, and long enough to be seen.
    """
    body = {"prompt": [[7]] * places, "max_tokens": 14, "ignore_eos": True, "vllm_xargs": {"d2cache_policy": "full"}}
    task = asyncio.create_task(client.post(COMPLETIONS, json=body))
    most = 0.0
    while not task.done():
        most = max(most, (await _gauges(client))["num_requests_running"])
        await asyncio.sleep(0.05)
    response = task.result()
    if response.status_code != 200:
        raise RuntimeError(f"{response.status_code}: {response.text[:200]}")
    return int(most)


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
