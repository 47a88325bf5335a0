"""What wide tables cost: steps of texts in blocks without a network, by the positions that max_tokens leaves open.

``python -m benchmarks.count.widths`` (two minutes on one core). A step is ``open``, ``place`` and ``close`` of
step/runner.py with PyTorch on a CPU, one thread, and the best of some steps after the first.
"""

from __future__ import annotations

import time

import numpy as np
import torch

from vllm_d2cache.canvas.request import Request
from vllm_d2cache.canvas.traits import FamilyTraits
from vllm_d2cache.mechanisms.base import Worker
from vllm_d2cache.options.sampling import SamplingSpec
from vllm_d2cache.options.server import ServerOptions
from vllm_d2cache.policies.budget import row_budget
from vllm_d2cache.requests.resolve import resolve
from vllm_d2cache.step.pages import Pages
from vllm_d2cache.step.runner import StepRunner

BLOCK, PROMPT, LONGEST, PAGE, WIDTH, VOCAB, STEPS = 32, 512, 32_768, 16, 16, 64, 6


def milliseconds(requests: int, canvas: int, policy: str) -> float:
    """Of a step of so many requests, each of which may write ``canvas`` tokens."""
    server = ServerOptions({"policy": policy, "threshold": 0.9}, block_length=BLOCK)
    traits = FamilyTraits(5, step_schedule="window", num_layers=2, block_length=BLOCK)
    runner, options = StepRunner(Worker(requests, LONGEST, torch.device("cpu"), traits, server)), resolve(server, {})
    for slot in range(requests):
        rows = row_budget(options, PROMPT, canvas, None)
        made = Request(f"r{slot}", PROMPT, canvas, options, SamplingSpec(), rows, first_end=PROMPT + BLOCK)
        runner.add(slot, made, np.arange(PROMPT) % 7 + 9)
    slots, host = torch.arange(requests), list(range(requests))
    pages = Pages(torch.zeros(requests, LONGEST // PAGE, dtype=torch.int32), PAGE)
    head, seconds = torch.randn(WIDTH, VOCAB, generator=torch.Generator().manual_seed(1)), []
    for _ in range(STEPS):
        begin = time.perf_counter()
        step = runner.place(runner.open(slots, host, reaches=[PROMPT + 2 * BLOCK] * requests), pages)
        assert step.rows is not None
        hidden = torch.ones(len(step.rows.logits_rows), WIDTH)
        runner.close(step, hidden, lambda hidden: hidden @ head)
        seconds.append(time.perf_counter() - begin)
    return min(seconds[1:]) * 1e3


def main() -> None:
    """Print a table."""
    torch.set_num_threads(1)
    widths = (256, 2048, LONGEST - PROMPT)
    print("| policy | requests |", " | ".join(f"{width:,} open" for width in widths), "|")
    print("|---|---|" + "---|" * len(widths))
    for policy in ("block", "d2cache"):
        for requests in (1, 8, 64):
            cells = (f"{milliseconds(requests, width, policy):.1f} ms" for width in widths)
            print(f"| {policy} | {requests} |", " | ".join(cells), "|", flush=True)


if __name__ == "__main__":
    main()
