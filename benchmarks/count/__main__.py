"""Prints what a step asks of a GPU outside the layers: ``python -m benchmarks.count``, or ``make count``.

Kernels, waits and operators of ``open``, ``place`` and ``close`` of step/runner.py for batches of requests of 768 + 256
positions, in steps after the first. A step is padded only where its rows fit into the largest graph: where they would
not, the texts are as long as they may be. The network and the rollout do not run. Then waits and copies of every policy
and decoder, with a small network (benchmarks/count/waits.py).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.count import waits
from benchmarks.count.kernels import counted_kernels
from vllm_d2cache.canvas.request import Request
from vllm_d2cache.canvas.traits import FamilyTraits
from vllm_d2cache.mechanisms.base import Finding, Hook, Worker
from vllm_d2cache.mechanisms.importance import Importance, ImportanceHook
from vllm_d2cache.options.sampling import SamplingSpec
from vllm_d2cache.options.server import DEFAULT_GRAPH_ROWS, ServerOptions
from vllm_d2cache.policies.budget import row_budget
from vllm_d2cache.requests.resolve import resolve
from vllm_d2cache.step.pages import Pages
from vllm_d2cache.step.runner import StepRunner

PROMPT, CANVAS, PAGE, VOCAB, WIDTH = 768, 256, 16, 32, 8
Text = tuple[int, int]  # positions of the prompt and of the canvas
BATCHES = (1, 8, 32, 64)
SETTINGS: dict[str, dict[str, Any]] = {
    "d2cache": {},
    "d2cache, threshold": {"threshold": 0.9},
    "d2cache, eb": {"decoder": "eb"},
    "full": {"policy": "full"},
    "prefix": {"policy": "prefix"},
}
# Where texts are cut into blocks of so many positions.
BLOCK = 32
BLOCK_SETTINGS: dict[str, dict[str, Any]] = {
    "block": {"policy": "block", "threshold": 0.9},
    "block, edit": {"policy": "block", "decoder": "edit", "threshold": 0.9},
    "block, d2cache": {"policy": "d2cache", "threshold": 0.9},
}
MIXED = [*SETTINGS.values(), {"score": "margin"}, {"policy": "dual", "tokens_per_step": 2}]


_LOGITS = torch.zeros(1 << 14, VOCAB)  # of a head that does not run


class Told(Hook):
    """In place of a hook that looks into the layers."""

    def __init__(self, finding: Finding) -> None:
        self.finding = finding

    def result(self, num_positions: int) -> Finding:
        """As if the layers had run."""
        return self.finding


class Steps:
    """A batch whose layers do not run."""

    def __init__(
        self, options: list[dict[str, Any]], samples: bool = False, block: int = 0, text: Text = (PROMPT, CANVAS)
    ) -> None:
        n, server, (prompt, canvas) = len(options), ServerOptions({}, block_length=block), text
        traits = FamilyTraits(5, block_length=block or None)
        self.runner = StepRunner(Worker(n, prompt + canvas, torch.device("cpu"), traits, server))
        self.slots, self.host = torch.arange(n), list(range(n))
        self.pages = Pages(torch.zeros(n, -(-(prompt + canvas) // PAGE), dtype=torch.int32), PAGE)
        self.importance = Importance(torch.rand(n, prompt + canvas, generator=torch.Generator().manual_seed(0)))
        for slot, chosen in enumerate(options):
            resolved = resolve(server, chosen)
            rows = row_budget(resolved, prompt, canvas, None)
            spec = SamplingSpec(0.7 if samples and slot % 5 == 0 else 0.0)
            self.runner.add(slot, Request(f"r{slot}", prompt, canvas, resolved, spec, rows), np.full(prompt, 6))

    def step(self, padded: bool) -> None:
        """One step."""
        step = self.runner.open(self.slots, self.host, padded)
        self.runner.place(step, self.pages)
        hooks = (Told(self.importance) if isinstance(hook, ImportanceHook) else hook for hook in step.hooks)
        step.hooks = tuple(hooks)
        hidden = torch.zeros(1, WIDTH).expand(len(step.rows.logits_rows), WIDTH)
        self.runner.close(step, hidden, lambda x: _LOGITS[: len(x)])


def text_of(options: dict[str, Any], batch: int, padded: bool, block: int = 0) -> Text | None:
    """The longest text of so many requests whose padded step is a graph; None = one of whole blocks there is not."""
    server, total = ServerOptions({}, block_length=block), PROMPT + CANVAS
    resolved = resolve(server, options)
    canvas = total // 4
    while padded and batch * row_budget(resolved, total - canvas, canvas, None) > DEFAULT_GRAPH_ROWS:
        total //= 2
        canvas = max(4, total // 4)  # a slot for each step, and one more
    return None if canvas < block else (total - canvas, canvas)


def measure(
    options: list[dict[str, Any]], padded: bool, samples: bool = False, block: int = 0, text: Text = (PROMPT, CANVAS)
) -> dict[str, Any]:
    """Kernels, of these Triton's, and waits of the third step."""
    steps = Steps(options, samples, block, text)
    steps.step(False)
    steps.step(padded)
    with counted_kernels() as (count, launched):
        steps.step(padded)
    kernels, triton = sum(count.kernels.values()), sum(launched.values())
    return {
        "text": text,
        "kernels": kernels,
        "triton": triton,
        "waits": sum(count.waits.values()),
        "by": count.kernels.most_common(12),
    }


def lines() -> list[dict[str, Any]]:
    """One for each setting, batch and form."""
    found = []
    for name, options in SETTINGS.items():
        forms = (False,) if options.get("policy") == "prefix" else (True, False)
        for n in BATCHES:
            for padded in forms:
                found += _line(name, options, n, padded)
    for name, options in BLOCK_SETTINGS.items():
        for n in BATCHES:
            for padded in (True, False):
                found += _line(name, options, n, padded, BLOCK)
    for n in BATCHES[1:]:
        mixed = [MIXED[i % len(MIXED)] for i in range(n)]
        found.append(
            {"setting": "mixed, some sampled", "batch": n, "form": _form(False), **measure(mixed, False, True)}
        )
    return found


def _line(name: str, options: dict[str, Any], n: int, padded: bool, block: int = 0) -> list[dict[str, Any]]:
    """One, or none where no graph has so many rows."""
    text = text_of(options, n, padded, block)
    line = {"setting": name, "batch": n, "form": _form(padded)}
    return [{**line, **measure([options] * n, padded, block=block, text=text)}] if text else []


def _form(padded: bool) -> str:
    return "padded" if padded else "exact"


def release() -> str:
    """Of PyTorch, without the build."""
    return torch.__version__.partition("+")[0]


def table(found: list[dict[str, Any]]) -> str:
    """Markdown."""
    rows = ["| setting | batch | positions | form | kernels | of Triton | waits |", "|---|---|---|---|---|---|---|"]
    for x in found:
        kernels, (prompt, canvas) = x["kernels"] + x["triton"], x["text"]
        rows.append(
            f"| {x['setting']} | {x['batch']} | {prompt} + {canvas} | {x['form']} | {kernels} | {x['triton']} | "
            f"{x['waits']} |"
        )
    return "\n".join(rows)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/count"))
    parser.add_argument("--by-operator", action="store_true", help="the most frequent operators of each line")
    args = parser.parse_args()
    found = lines()
    print(table(found))
    if args.by_operator:
        for x in found:
            print(x["setting"], x["batch"], x["form"], x["by"])
    args.out.with_suffix(".md").write_text(table(found) + "\n")
    # What an operator is made of differs from release to release of PyTorch; on which CPU it was counted does not.
    written = {"torch": release(), "lines": [{**x, "by": dict(x["by"])} for x in found]}
    args.out.with_suffix(".json").write_text(json.dumps(written, indent=1) + "\n")
    waited = waits.lines()
    print(waits.table(waited))
    waits.write(waited, args.out.with_name("waits"))


if __name__ == "__main__":
    main()
