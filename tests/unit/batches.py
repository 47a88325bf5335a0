"""Requests through the real StepRunner with random numbers in place of a network: cheap, and free of batch effects."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vllm_d2cache.canvas.grammar import GrammarState, Matcher, bits_of
from vllm_d2cache.canvas.request import Request
from vllm_d2cache.canvas.rows import StepRows
from vllm_d2cache.canvas.traits import FamilyTraits
from vllm_d2cache.mechanisms.base import Finding, Hook, Worker
from vllm_d2cache.mechanisms.drift import Drift, DriftHook
from vllm_d2cache.mechanisms.hidden_keys import KeysHook
from vllm_d2cache.mechanisms.importance import Importance, ImportanceHook
from vllm_d2cache.mechanisms.row_exits import ExitHook
from vllm_d2cache.options.sampling import SamplingSpec
from vllm_d2cache.options.server import ServerOptions
from vllm_d2cache.policies.budget import row_budget
from vllm_d2cache.requests.resolve import parse_request_options, parse_server_options, resolve
from vllm_d2cache.step.logprobs import EmittedLogprobs
from vllm_d2cache.step.pages import Pages
from vllm_d2cache.step.runner import Closed, StepRunner
from vllm_d2cache.step.step import Step as RunningStep

VOCAB, MASK = 13, 5
LAYERS = 8  # as many as a policy that treats them differently may ask about
# A table of corpus frequencies for this vocabulary.
FREQUENCIES = str(Path(__file__).with_name("token_freq_13.npy"))


@dataclass
class Step:
    """What happened to one request in one step."""

    refreshed: list[int]
    full: bool
    predicted: list[int]
    window: range
    committed: list[tuple[int, int]]  # slot, token
    emitted: list[int]
    masked: list[int]  # slots still masked afterwards
    keys: list[int] | None = None  # positions the rows attended to; None = all
    choice: tuple[bool, int, int] | None = None  # whether layers chose their keys, or had; how many; pooling
    revoked: list[int] = field(default_factory=list)  # committed earlier and masked again


@dataclass
class FakeJob:
    """One request; ``noise`` seeds the numbers its network would give."""

    prompt: list[int]
    canvas_length: int
    options: dict[str, Any] = field(default_factory=dict)  # by plain name
    sampling: SamplingSpec = field(default_factory=SamplingSpec)
    noise: int = 0
    emitted_before: int = 0
    given: tuple[int, ...] = ()
    grammar: Callable[[], Matcher] | None = None  # makes a matcher at its start
    steps: list[Step] = field(default_factory=list)
    output: list[int] = field(default_factory=list)
    logprobs: list[tuple[list[int], list[float], int]] = field(default_factory=list)  # ids, values, rank; as emitted

    @property
    def total(self) -> int:
        return len(self.prompt) + self.canvas_length

    @property
    def done(self) -> bool:
        stopped = bool(set(self.output) & set(self.sampling.stop_token_ids))
        return stopped or self.emitted_before + len(self.output) == self.canvas_length

    def fresh(self) -> FakeJob:
        """The same request, not yet run."""
        return replace(self, emitted_before=0, steps=[], output=[], logprobs=[])

    def numbers(self, step: int | None = None, shadow: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """A step's logits [T, vocab] and importance [T]: a function of the request and its step alone."""
        number = len(self.steps) if step is None else step
        generator = torch.Generator().manual_seed(1000 * self.noise + number + 500 * shadow)
        logits = 3 * torch.randn(self.total, VOCAB, generator=generator)
        logits[:, MASK] += 3  # would often win
        return logits, torch.rand(self.total, generator=generator) ** 3 + 1e-3

    def states(self, layer: int) -> torch.Tensor:
        """[T, 3] hidden states behind a layer, with more or less of the last step in them."""
        seeds = [7000 * self.noise + LAYERS * number + layer for number in (len(self.steps), len(self.steps) - 1)]
        now, last = (torch.randn(self.total, 3, generator=torch.Generator().manual_seed(abs(s))) for s in seeds)
        return last + now * torch.arange(self.total).remainder(5).unsqueeze(1) / 4


class Told(Hook):
    """In place of a hook that would have watched the layers: what it finds is known beforehand."""

    def __init__(self, finding: Finding) -> None:
        self.finding = finding

    def result(self, num_positions: int) -> Finding:
        return self.finding


def without_layers(step: RunningStep, columns: list[torch.Tensor]) -> tuple[Hook, ...]:
    """The hooks of a step whose layers do not run, made of each request's importance [T]; NaN for who reads none."""
    return tuple(_told(hook, step.rows, columns) for hook in step.hooks)


def _told(hook: Hook, rows: StepRows, columns: list[torch.Tensor]) -> Hook:
    width = rows.view.num_positions
    if isinstance(hook, ImportanceHook):
        values = torch.full((len(columns), width), torch.nan)
        for r, column in enumerate(columns):
            if hook.wanted[r]:
                values[r] = 0
                values[r, : len(column)] = column
        return Told(Importance(values))
    if isinstance(hook, DriftHook):
        similarity = torch.full((len(columns),), torch.nan)
        attended = torch.zeros(len(columns), width, dtype=torch.bool)
        for r, (watched, column) in enumerate(zip(hook.watched, columns, strict=True)):
            if watched is not None:
                similarity[r] = column.amax()
                attended[r, column.masked_fill(~watched.known, -1.0).topk(1).indices] = True
        return Told(Drift(similarity, attended))
    return hook


def hook_of(step: RunningStep, kind: type[Any]) -> Any:
    return next((hook for hook in step.hooks if isinstance(hook, kind)), None)


class Batch:
    """Runs jobs together; slots and rows are in no particular order.

    Args:
        max_steps: of any one job; more is an endless loop.
        pads: steps that can be padded are.
    """

    def __init__(
        self,
        jobs: Sequence[FakeJob],
        server: dict[str, Any] | None = None,
        max_steps: int = 300,
        shift: int = 0,
        pads: bool = False,
    ) -> None:
        self.jobs = list(jobs)
        self.pads = pads
        self.padded_steps = 0
        self.server: ServerOptions = parse_server_options({"token_frequencies": FREQUENCIES, **(server or {})})
        self.max_steps = max_steps
        longest = max(job.total for job in jobs)
        # One slot more than jobs, and longer than any of them.
        traits = FamilyTraits(MASK, shift, num_layers=LAYERS)
        self.runner = StepRunner(Worker(len(jobs) + 1, longest + 3, torch.device("cpu"), traits, self.server))

    def slot(self, i: int) -> int:
        return (2 * i + 1) % len(self.jobs) if len(self.jobs) % 2 else len(self.jobs) - i

    def add(self, i: int) -> None:
        job = self.jobs[i]
        asked = parse_request_options({f"d2cache_{k}": v for k, v in job.options.items()})
        options = resolve(self.server, asked, ordered=job.grammar is not None)
        length, budget = len(job.prompt), self.server.refresh_budget
        rows = row_budget(options, length, job.canvas_length, budget)
        request = Request(f"r{i}", length, job.canvas_length, options, job.sampling, rows, job.given)
        if job.grammar is not None:
            bitmask = torch.zeros(1, -(-VOCAB // 32), dtype=torch.int32)
            request.grammar = GrammarState(job.grammar(), bitmask, bits_of([MASK], 1), job.sampling.stop_token_ids)
        self.runner.add(self.slot(i), request, np.array(job.prompt, dtype=np.int64), job.emitted_before)

    def run(self, start_at: Sequence[int] | None = None) -> None:
        """Run all jobs to their end; job i joins at step ``start_at[i]``."""
        starts = start_at or [0] * len(self.jobs)
        running: list[int] = []
        for now in range(self.max_steps + max(starts)):
            for i, start in enumerate(starts):
                if start == now:
                    self.add(i)
                    running.insert(now % (len(running) + 1), i)
            if running:
                self.step(running)
            for i in [i for i in running if self.jobs[i].done]:
                running.remove(i)
                self.runner.remove(self.slot(i))
            if not running and now >= max(starts):
                return
        raise AssertionError(f"not finished after {self.max_steps} steps")

    def step(self, running: list[int]) -> None:
        """One step of the given jobs."""
        slots = [self.slot(i) for i in running]
        padded = self.pads and self.runner.forms.can_pad(slots)
        self.padded_steps += padded
        step = self.runner.open(torch.tensor(slots), slots, padded)
        rows = step.rows
        assert rows.positions.shape[0] == sum(rows.counts) + sum(rows.extra) == rows.input_ids.shape[0]
        self.runner.place(
            step, Pages(torch.zeros(len(slots), 1 + rows.view.num_positions // 16, dtype=torch.int32), 16)
        )
        logits, columns, offset = [], [], 0
        for i, count in zip(running, rows.counts, strict=True):
            numbers, column = self.jobs[i].numbers()
            columns.append(column)
            logits.append(numbers[rows.positions[offset : offset + count]])
            offset += count
        for i, count in zip(running, rows.extra, strict=True):
            logits.append(self.jobs[i].numbers(shadow=True)[0][rows.positions[offset : offset + count]])
            offset += count
        self._let_rows_leave(running, step)
        seen, step.hooks = step.hooks, without_layers(step, columns)
        closed = self.runner.close(step, torch.cat(logits)[rows.logits_rows], torch.clone)
        step.hooks = seen
        self._record(running, step, closed)
        if closed.logprobs is not None:
            self._record_logprobs(running, closed.logprobs)

    def _let_rows_leave(self, running: list[int], step: RunningStep) -> None:
        """Run the gate, if there is one, and see that as many rows stay as was said."""
        gate, rows = hook_of(step, ExitHook), step.rows
        if gate is None:
            return
        for layer in range(LAYERS):
            parts = zip(running, rows.by_request(), strict=True)
            hidden = torch.cat([self.jobs[i].states(layer)[p] for i, p in parts])
            gate.behind(layer, hidden / 4, hidden * 3 / 4)
            assert [int(p.sum()) for p in gate.present().split(rows.counts)] == gate.staying[layer]

    def _record(self, running: list[int], step: RunningStep, closed: Closed) -> None:
        rows, result, offset = closed.rows, closed.result, 0
        for r, i in enumerate(running):
            job, view = self.jobs[i], rows.view
            mine = slice(offset, offset + rows.counts[r])
            positions = rows.positions[mine][rows.live[mine]].tolist()
            offset += rows.counts[r]
            tokens = self.runner.canvas.tokens[self.slot(i), len(job.prompt) :]
            committed = [(s, int(tokens[s])) for s in result.committed[r].nonzero().flatten().tolist()]
            start, length = int(view.window_start[r]), int(view.options.window[r])
            emitted = result.tokens[r, : int(result.num_tokens[r])].tolist()
            assert len(emitted) <= self.runner.canvas.requests[self.slot(i)].most_emitted
            predicted = rows.predicted[r].nonzero().flatten().tolist()
            masked = result.masked[r].nonzero().flatten().tolist()
            window = range(start, min(start + length, job.canvas_length))
            hidden = hook_of(step, KeysHook)
            visible = None if hidden is None else hidden.keys[r]
            keys = None if visible is None else visible.tolist()
            chosen = None if hidden is None else hidden.choices[r]
            choice = None if chosen is None else (chosen.choose, chosen.count, chosen.pool)
            revoked = [] if result.revoked is None else result.revoked[r].nonzero().flatten().tolist()
            full = len(positions) == job.total
            job.steps.append(
                Step(positions, full, predicted, window, committed, emitted, masked, keys, choice, revoked)
            )
            job.output += emitted

    def _record_logprobs(self, running: list[int], emitted: EmittedLogprobs) -> None:
        for r, i in enumerate(running):
            for e in range(emitted.starts[r], emitted.starts[r + 1]):
                ids, values = emitted.token_ids[e].tolist(), emitted.logprobs[e].tolist()
                self.jobs[i].logprobs.append((ids, values, int(emitted.ranks[e])))


def run_alone(job: FakeJob, server: dict[str, Any] | None = None, **settings: Any) -> FakeJob:
    """A fresh copy of ``job`` after it ran by itself."""
    copy = job.fresh()
    Batch([copy], server, **settings).run()
    return copy
