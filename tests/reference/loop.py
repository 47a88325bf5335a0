"""Runs requests through the StepRunner with the dense model in place of an engine."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from tests.reference.dense import DenseModel
from tests.reference.dllm import DLLMCache
from tests.reference.elastic import DriftLoop
from tests.reference.es import EarlySkip
from tests.reference.oracle import SERVER
from tests.reference.spa import SPACache
from tests.unit.batches import Told, hook_of
from vllm_d2cache.canvas.request import Request, SamplingSpec
from vllm_d2cache.canvas.traits import FamilyTraits
from vllm_d2cache.mechanisms.base import Hook, Worker
from vllm_d2cache.mechanisms.drift import Drift, DriftHook
from vllm_d2cache.mechanisms.hidden_keys import KeysHook
from vllm_d2cache.mechanisms.importance import Importance, ImportanceHook
from vllm_d2cache.ops.rollout import push_back_map, rollout
from vllm_d2cache.options.server import ServerOptions
from vllm_d2cache.requests.resolve import parse_server_options, resolve
from vllm_d2cache.step.runner import StepRunner


@dataclass
class Job:
    """One request and what became of it."""

    prompt: list[int]
    canvas_length: int
    options: dict[str, Any]
    sampling: SamplingSpec = field(default_factory=SamplingSpec)
    steps: list[tuple[list[int] | None, list[tuple[int, int]]]] = field(default_factory=list)
    output: list[int] = field(default_factory=list)
    masked_left: int = -1
    layers: DLLMCache | None = None  # of the policies dllm_cache and spa
    drift: DriftLoop = field(default_factory=DriftLoop)
    skips: EarlySkip | None = None  # of the policy es


class Left(Hook):
    """Rows that have left the dense model."""

    def __init__(self, still_there: torch.Tensor) -> None:
        self.still_there = still_there

    def present(self) -> torch.Tensor:
        return self.still_there


def run_jobs(
    models: list[DenseModel],
    jobs: list[Job],
    server: ServerOptions | None = None,
    start_at: list[int] | None = None,
) -> None:
    """Denoise all jobs in one batch; job i joins at step ``start_at[i]``. One model (cache) a job."""
    server = server or parse_server_options(SERVER)
    config = models[0].config
    shift = models[0].logit_shift
    family = "dream" if shift else "llada"
    traits = FamilyTraits(config["mask_token_id"], shift, num_layers=models[0].num_layers, family=family)
    max_len = max(len(j.prompt) + j.canvas_length for j in jobs)
    runner = StepRunner(Worker(len(jobs), max_len, torch.device("cpu"), traits, server))
    start_at = start_at or [0] * len(jobs)
    running: list[int] = []
    for step in range(10_000):
        for i, job in enumerate(jobs):
            if start_at[i] == step:
                options = resolve(server, job.options)
                request = Request(f"r{i}", len(job.prompt), job.canvas_length, options, job.sampling)
                runner.add(i, request, np.array(job.prompt))
                models[i].reset(len(job.prompt) + job.canvas_length)
                if options.policy == "dllm_cache":
                    job.layers = DLLMCache(models[i], len(job.prompt), **options.policy_options)
                if options.policy == "spa":
                    job.layers = SPACache(models[i], len(job.prompt), **options.policy_options)
                if options.policy == "es":
                    window = options.window_length(job.canvas_length)
                    shape = (len(job.prompt), job.canvas_length, window)
                    job.skips = EarlySkip(models[i], *shape, **options.policy_options)
                running.append(i)
        if running:
            _step(runner, models, jobs, running)
        for i in [i for i in running if _is_done(jobs[i])]:
            running.remove(i)
            runner.remove(i)
        if not running and step >= max(start_at):
            return
    raise AssertionError("did not finish")


def _is_done(job: Job) -> bool:
    return len(job.output) == job.canvas_length or bool(set(job.output) & set(job.sampling.stop_token_ids))


def _step(runner: StepRunner, models: list[DenseModel], jobs: list[Job], running: list[int]) -> None:
    step = runner.open(torch.tensor(running), running)
    rows, reads = step.rows, hook_of(step, ImportanceHook)
    hidden_keys, meter = hook_of(step, KeysHook), hook_of(step, DriftHook)
    hidden, importance = [], torch.zeros(len(running), rows.view.num_positions)
    present = torch.ones(len(rows.request), dtype=torch.bool)
    similarity, attended = torch.zeros(len(running)), torch.zeros(importance.shape, dtype=torch.bool)
    offset = 0
    for r, (i, count) in enumerate(zip(running, rows.counts, strict=True)):
        positions = rows.positions[offset : offset + count]
        models[i].visible = None if hidden_keys is None else hidden_keys.keys[r]
        models[i].choice = None if hidden_keys is None else hidden_keys.choices[r]
        cache, skips = jobs[i].layers, jobs[i].skips
        if skips is not None:
            out, here = skips.forward(rows.input_ids[offset : offset + count].long(), positions.tolist())
            present[offset : offset + count], maps = torch.isin(positions, torch.tensor(here)), []
        elif cache is not None:
            total = len(jobs[i].prompt) + jobs[i].canvas_length
            out, maps = cache.forward(runner.canvas.tokens[i, :total].long())[positions], []
        else:
            out, maps = models[i].forward(rows.input_ids[offset : offset + count].long(), positions)
        hidden.append(out)
        if reads is not None and reads.wanted[r]:
            layers = [push_back_map(m) for m in reversed(maps)]
            total = len(jobs[i].prompt) + jobs[i].canvas_length
            importance[r, :total] = rollout(layers, positions, total)
        watched = None if meter is None else meter.watched[r]
        if watched is not None:
            known = watched.known.nonzero().flatten().tolist()
            found = jobs[i].drift.step(maps, positions.tolist(), watched.positions.tolist(), known)
            similarity[r], attended[r, found[1]] = found[0], True
        offset += count
    step.hooks = (Told(Importance(importance)), Told(Drift(similarity, attended)), Left(present))
    closed = runner.close(step, torch.cat(hidden)[rows.logits_rows], models[0].lm_head)
    rows, stats, result = closed.rows, closed.stats, closed.result
    offset = 0
    for r, i in enumerate(running):
        job = jobs[i]
        positions = rows.positions[offset : offset + rows.counts[r]].tolist()
        offset += rows.counts[r]
        slots = result.committed[r].nonzero().flatten().tolist()
        skips = job.skips
        if skips is not None:
            mine = rows.predicted_index[0] == r
            predicted = zip(rows.predicted_index[1][mine].tolist(), stats.confidence[mine].tolist(), strict=True)
            skips.note(dict(predicted), slots)
        tokens = runner.canvas.tokens[i, len(job.prompt) :]
        job.steps.append((None if rows.full[r] else positions, [(s, int(tokens[s])) for s in slots]))
        job.output += result.tokens[r, : int(result.num_tokens[r])].tolist()
        job.masked_left = int(result.masked[r].sum())
