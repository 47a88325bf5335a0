"""Held-out accuracy of the small trained checkpoint under each cache policy, through the engine.

The same problems for every setting, in one engine. Prints a table; writes JSON, a Markdown table and a plot to
benchmarks/results/. Run as ``python -m benchmarks.eval_tiny``. "Right" means that the text is the one correct answer,
character by character.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the model is tiny: a second thread only waits
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

from rich.console import Console
from rich.table import Table

from benchmarks.machine import caption, machine
from tools.tiny_tasks import Problem, held_out
from tools.traces import Trace, find

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
SETTINGS: dict[str, dict[str, Any]] = {
    "full": {"policy": "full"},
    "d2cache": {},
    "d2cache, current_k 8": {"current_k": 8},
    "full, threshold 0.9": {"policy": "full", "threshold": 0.9},
    "d2cache, threshold 0.9": {"threshold": 0.9},
}


@dataclass
class Score:
    """One line of the table."""

    setting: str
    options: dict[str, Any]
    problems: int
    right: int
    interval: float  # half width of the 95 % interval, in points
    steps: float  # a problem
    rows_per_step: float
    row_share: float  # of the rows that full recompute would take in the same steps
    tokens_per_step: float
    seconds: float
    by_kind: dict[str, float] = field(default_factory=dict)

    @property
    def accuracy(self) -> float:
        """Percent."""
        return 100 * self.right / self.problems


def run(llm: Any, problems: list[Problem], name: str, options: dict[str, Any], traces: Path) -> Score:
    """All problems at once under one setting."""
    from vllm import SamplingParams

    extra = {f"d2cache_{key}": value for key, value in options.items()}
    params = [SamplingParams(temperature=0, max_tokens=p.canvas, extra_args=extra) for p in problems]
    chats = [[{"role": "user", "content": p.prompt}] for p in problems]
    start = time.perf_counter()
    outputs = llm.chat(chats, params, use_tqdm=sys.stderr.isatty())
    seconds = time.perf_counter() - start
    found: list[Trace] = [find(traces, f"{o.request_id}-") for o in outputs]
    right = [o.outputs[0].text.strip() == p.answer for o, p in zip(outputs, problems, strict=True)]
    kinds = defaultdict(list)
    for ok, problem in zip(right, problems, strict=True):
        kinds[problem.kind].append(ok)
    n, share = len(problems), sum(right) / len(problems)
    steps, rows = sum(t.steps for t in found), sum(t.rows for t in found)
    return Score(
        name,
        options,
        n,
        sum(right),
        100 * 1.96 * math.sqrt(share * (1 - share) / n),
        steps / n,
        rows / steps,
        rows / sum(t.full_rows for t in found),
        sum(len(pairs) for t in found for pairs in t.committed) / steps,
        seconds,
        {kind: 100 * sum(oks) / len(oks) for kind, oks in kinds.items()},
    )


def cells(score: Score) -> list[str]:
    """The line as text."""
    return [
        score.setting,
        f"{score.accuracy:.1f} ± {score.interval:.1f}",
        f"{score.steps:.1f}",
        f"{score.tokens_per_step:.2f}",
        f"{score.rows_per_step:.1f}",
        f"{100 * score.row_share:.0f} %",
        f"{score.seconds:.0f}",
    ]


HEADS = ["setting", "right, %", "steps", "tokens/step", "rows/step", "of full's rows", "seconds"]


def markdown(scores: list[Score], note: str) -> str:
    """The table for the documents."""
    kinds = list(scores[0].by_kind)
    lines = ["| " + " | ".join(HEADS) + " |", "|---" * len(HEADS) + "|"]
    lines += ["| " + " | ".join(cells(s)) + " |" for s in scores]
    lines += [
        "",
        "By kind, percent right:",
        "",
        "| setting | " + " | ".join(kinds) + " |",
        "|---" * (len(kinds) + 1) + "|",
    ]
    lines += [f"| {s.setting} | " + " | ".join(f"{s.by_kind[k]:.0f}" for k in kinds) + " |" for s in scores]
    return "\n".join([*lines, "", f"{scores[0].problems} held-out problems; {note}", ""])


def plot(scores: list[Score], path: Path) -> None:
    """Accuracy against rows a step."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4))
    for s in scores:
        axes.errorbar(s.rows_per_step, s.accuracy, yerr=s.interval, fmt="o", capsize=3, label=s.setting)
    axes.set_xlabel("rows recomputed a step")
    axes.set_ylabel("right answers, %")
    axes.set_ylim(0, 100)
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Run every setting and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=str(ROOT / "models" / "tiny-llada"))
    parser.add_argument("--problems", type=int, default=504)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--out", type=Path, default=RESULTS / "tiny_eval.json")
    args = parser.parse_args()
    from vllm import LLM

    console = Console(width=130)
    problems = held_out(args.problems)
    scores = []
    with tempfile.TemporaryDirectory() as directory:
        with console.status("starting the engine"):
            settings = {"d2cache": {"trace_dir": directory}}
            llm = LLM(args.model, dtype=args.dtype, max_model_len=1024, max_num_seqs=16, additional_config=settings)
        for name, options in SETTINGS.items():
            console.print(f"[bold]{name}[/bold]")
            scores.append(run(llm, problems, name, options, Path(directory)))
    facts = machine()
    table = Table(title=f"{args.problems} held-out problems, {args.dtype}")
    for head in HEADS:
        table.add_column(head, justify="left" if head == "setting" else "right")
    for score in scores:
        table.add_row(*cells(score))
    console.print(table)
    console.print(caption(facts))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({"machine": facts, "scores": [asdict(s) for s in scores]}, indent=1) + "\n")
    args.out.with_suffix(".md").write_text(markdown(scores, f"{args.dtype}; {caption(facts)}"))
    plot(scores, args.out.with_suffix(".png"))
    console.print(f"written to {args.out} and beside it")


if __name__ == "__main__":
    main()
