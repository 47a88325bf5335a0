"""Published traces of block diffusion as requests of ours, and the StepRunner driven with a block-causal network."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from vllm_d2cache.canvas.extent import Extent, settled_positions
from vllm_d2cache.canvas.request import Request
from vllm_d2cache.canvas.traits import FamilyTraits
from vllm_d2cache.mechanisms.base import Worker
from vllm_d2cache.options.sampling import SamplingSpec
from vllm_d2cache.options.server import ServerOptions
from vllm_d2cache.policies.budget import row_budget
from vllm_d2cache.requests.resolve import parse_request_options, resolve
from vllm_d2cache.step.pages import Pages
from vllm_d2cache.step.runner import StepRunner
from vllm_d2cache.step.step import Step

SHIFTED = ("fast_dllm_v2",)


@dataclass
class BlockStep:
    """What one step did; positions are absolute."""

    rows: list[int]
    limits: list[int]
    tokens_in: list[int]  # of the rows
    predicted: dict[int, tuple[int, float]]  # position -> token, confidence
    committed: list[list[int]]  # position, token
    edited: list[list[int]]  # position, old token, new token
    emitted: list[int]


@dataclass
class BlockJob:
    """A request of a block-causal family: by plain option names, and what became of it."""

    prompt: list[int]
    max_tokens: int
    block_length: int
    options: dict[str, Any] = field(default_factory=dict)
    sampling: SamplingSpec = field(default_factory=SamplingSpec)
    shift: int = 0
    steps: list[BlockStep] = field(default_factory=list)
    output: list[int] = field(default_factory=list)

    @property
    def done(self) -> bool:
        return len(self.output) >= self.max_tokens or bool(set(self.output) & set(self.sampling.stop_token_ids))


def job_of(trace: dict[str, Any]) -> BlockJob:
    """A trace's settings in our words."""
    s, family, prompt = trace["settings"], trace["family"], trace["prompt_ids"]
    options: dict[str, Any] = {"policy": "block", "threshold": s["threshold"] if s["threshold"] <= 1 else 0}
    sampling: dict[str, Any] = {}
    tokens = s.get("gen_length")
    if family == "llada2":
        options["steps"] = min(s["steps"], tokens // s.get("minimal_topk", 1))
    elif family == "llada2.1":
        options |= {"decoder": "edit", "tokens_per_step": s["num_to_transfer"], "max_post_steps": s["max_post_steps"]}
        options["editing_threshold"] = min(1, s["editing_threshold"])
    elif family == "fast_dllm_v2":
        length = s["block_length"]
        options |= {"window": s["small_block_length"], "block_cache": "on" if s["use_block_cache"] else "off"}
        tokens = (len(prompt) // length + s["max_new_tokens"] // length) * length - len(prompt)
    else:
        options["steps"] = s["denoising_steps"]
        if s["strategy"] == "low_confidence_static":
            options["threshold"] = 0
        if s["strategy"] == "sequential":
            del options["threshold"]
            options["decoder"] = "sequential"
        if s["loop"] == "generate.py":
            sampling = {"temperature": 1.0, "top_k": 1}
    spec = SamplingSpec(**sampling, stop_token_ids=tuple(s["eos_ids"]))
    return BlockJob(prompt, tokens, s["block_length"], options, spec, int(family in SHIFTED))


def start(runner: StepRunner, slot: int, job: BlockJob, server: ServerOptions) -> None:
    """Give ``slot`` to a request as the engine does."""
    options = resolve(server, parse_request_options({f"d2cache_{k}": v for k, v in job.options.items()}))
    length = len(job.prompt)
    canvas = options.canvas_length(length, job.max_tokens)
    budget = row_budget(options, length, canvas, None)
    end = settled_positions(length, 0, job.block_length) + job.block_length
    request = Request("r", length, canvas, options, job.sampling, budget, first_end=end)
    runner.add(slot, request, np.array(job.prompt))


def run(job: BlockJob, model: Any, max_steps: int = 500, piece: int = 0) -> BlockJob:
    """Run a request to its end on ``model`` (tests/reference/blocks.py, BlockModel).

    Args:
        piece: positions of the prompt that are computed at a time, as far as its first step allows; 0 = all at once.
    """
    traits = FamilyTraits(
        model.config["mask_token_id"], job.shift, "window", model.config["num_hidden_layers"], "", job.block_length
    )
    longest = len(job.prompt) + job.max_tokens + job.block_length
    server = ServerOptions({}, block_length=job.block_length)
    runner = StepRunner(Worker(2, longest, torch.device("cpu"), traits, server))
    start(runner, 1, job, server)
    model.reset(longest)
    if piece:
        extent = Extent(len(job.prompt), longest, 0, job.block_length, piece, job.block_length * job.shift)
        reach = 0
        while reach < extent.reusable(0):
            reach += min(piece, extent.reusable(0) - reach)
            fill(runner, model, reach)
    while not job.done:
        assert len(job.steps) < max_steps, "an endless loop"
        job.steps.append(step(runner, model, job))
        job.output += job.steps[-1].emitted
    del job.output[job.max_tokens :]
    for i, token in enumerate(job.output):
        if token in job.sampling.stop_token_ids:
            del job.output[i + 1 :]
    return job


def forward(runner: StepRunner, model: Any, opened: Step) -> tuple[torch.Tensor, list[int]]:
    """Final hidden states of all rows, and their limits; rows of a block go through the network together."""
    length = runner.canvas.requests[1].length
    placed = runner.place(opened, Pages(torch.zeros(1, 1 + length // 16, dtype=torch.int32), 16))
    assert placed.layout is not None and placed.layout.limits is not None
    limits, hidden = placed.layout.limits.tolist(), []
    positions, input_ids = opened.packed()
    for limit in sorted(set(limits)):
        mine = torch.tensor([n for n, other in enumerate(limits) if other == limit])
        model.visible = torch.arange(limit)
        hidden.append(model.forward(input_ids[mine].long(), positions[mine])[0])
    return torch.cat(hidden), limits


def fill(runner: StepRunner, model: Any, reach: int) -> None:
    """Store K and V of the request in slot 1 up to ``reach``."""
    begin = runner.canvas.requests[1].computed
    opened = runner.open(torch.tensor([1]), [1], reaches=[reach])
    assert opened.rows is None and opened.packed()[0].tolist() == list(range(begin, reach))
    assert opened.packed()[1].tolist() == runner.canvas.tokens[1, begin:reach].tolist()
    forward(runner, model, opened)


def step(runner: StepRunner, model: Any, job: BlockJob) -> BlockStep:
    """One step of the request in slot 1."""
    opened = runner.open(torch.tensor([1]), [1], reaches=[runner.canvas.requests[1].length])
    rows, prompt = opened.rows, len(job.prompt)
    assert rows is not None
    assert len(rows.positions) <= runner.canvas.requests[1].row_budget or not job.steps
    hidden, limits = forward(runner, model, opened)
    before = runner.canvas.tokens[1].tolist()
    closed = runner.close(opened, hidden[rows.logits_rows], model.lm_head)
    after, result = runner.canvas.tokens[1].tolist(), closed.result
    predicted = {
        prompt + slot: (int(token), float(confidence))
        for slot, token, confidence in zip(
            rows.predicted_index[1].tolist(), closed.stats.token, closed.stats.confidence, strict=True
        )
    }
    committed = [prompt + slot for slot in result.committed[0].nonzero().flatten().tolist()]
    revised = [] if result.revised is None else result.revised[0].nonzero().flatten().tolist()
    return BlockStep(
        rows.positions.tolist(),
        limits,
        rows.input_ids.tolist(),
        predicted,
        [[p, after[p]] for p in committed],
        [[prompt + slot, before[prompt + slot], after[prompt + slot]] for slot in revised],
        result.tokens[0, : int(result.num_tokens[0])].tolist(),
    )
