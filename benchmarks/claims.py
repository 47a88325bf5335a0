"""What papers say of diffusion caches and decoding, tried on a small checkpoint: a table and a panel for each.

    python -m benchmarks.claims [--model DIR] [--problems N] [--out benchmarks/results/claims_MODEL]

One engine answers the same held-out problems under every setting below, greedily, many at a time. Differences are
paired (vllm_d2cache/cli/paired.py). docs/claims.md says what follows.

* Order: Spearman's correlation between a slot's place and the step that committed it, over the slots up to the end of
  the text, averaged over the responses of four slots and more; 1 is left to right.
* Early end: the share of responses that are shorter than the right answer.
* Rows: positions recomputed, as a share of those that full recompute takes for the same steps.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.machine import caption, machine
from tools.tiny_tasks import Problem, held_out
from tools.traces import Trace, read
from vllm_d2cache.cli.paired import Difference, difference


@dataclass(frozen=True)
class Claim:
    """What is said, by whom, and the settings that try it; differences are from the first of them."""

    name: str
    said: str
    x: str  # the field of `Result` that a picture names beside each setting
    settings: tuple[dict[str, Any], ...]


CLAIMS = (
    Claim(
        "certainty prior",
        "d2Cache: the certainty prior leads decoding from left to right and avoids an early end of the text.",
        "order",
        ({"policy": "full", "sigma": 0.0}, {"policy": "full", "sigma": 10.0}, {"policy": "full", "sigma": 3.0}),
    ),
    Claim(
        "partial refresh",
        "d2Cache: a part of the rows is enough for the quality of full recompute.",
        "rows",
        (
            {"policy": "full"},
            {"policy": "d2cache"},
            *({"policy": "d2cache", "current_k": k} for k in (16, 8, 4, 2)),
        ),
    ),
    Claim(
        "parallel commits",
        "Fast-dLLM: committing every token above a confidence threshold keeps the quality of one token a step.",
        "tokens_per_forward",
        ({"policy": "full"}, *({"policy": "full", "threshold": t} for t in (0.95, 0.9, 0.8, 0.7, 0.5))),
    ),
    Claim(
        "refresh intervals",
        "dLLM-Cache: the prompt may be refreshed seldom, the response more often, at little loss.",
        "rows",
        (
            {"policy": "full", "sigma": 0.0, "window": 32},
            *(
                {"policy": "dllm_cache", "kp": kp, "kr": kr}
                for kp, kr in ((4, 4), (50, 1), (50, 4), (50, 8), (200, 16))
            ),
        ),
    ),
)


@dataclass(frozen=True)
class Result:
    """One setting on all problems; shares and differences in percent."""

    claim: str
    options: dict[str, Any]
    score: float
    order: float
    early: float
    rows: float
    tokens_per_forward: float
    marks: str = field(repr=False)

    @property
    def label(self) -> str:
        """Policy and options."""
        rest = " ".join(f"{name} {value:g}" for name, value in self.options.items() if name != "policy")
        return f"{self.options['policy']} {rest}".strip()


def order_of(trace: Trace) -> float | None:
    """Spearman's correlation of place and step; None for fewer than four slots, or if one step committed them all."""
    import numpy as np

    length = len(trace.output or [])
    step_of = {slot: step for step, pairs in enumerate(trace.committed) for slot, _ in pairs if slot < length}
    if len(step_of) < 4:
        return None
    steps = np.array([step_of[slot] for slot in sorted(step_of)])
    _, number, count = np.unique(steps, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(count) - (count - 1) / 2)[number]
    return float(np.corrcoef(np.arange(len(ranks)), ranks)[0, 1]) if ranks.std() else None


def measure(llm: Any, problems: list[Problem], claim: Claim, options: dict[str, Any], traces: Path) -> Result:
    """Ask everything once under one setting. The directory of traces is emptied first."""
    from vllm import SamplingParams

    for old in traces.glob("*.jsonl"):
        old.unlink()
    extra = {f"d2cache_{name}": value for name, value in options.items()}
    params = [SamplingParams(temperature=0, max_tokens=p.canvas, extra_args=extra) for p in problems]
    chats: list[Any] = [[{"role": "user", "content": p.prompt}] for p in problems]
    texts = [found.outputs[0].text.strip() for found in llm.chat(chats, params, use_tqdm=False)]
    records = [read(path) for path in sorted(traces.glob("*.jsonl"))]
    assert len(records) == len(problems), "every request leaves a trace"
    orders = [order for order in map(order_of, records) if order is not None]
    marks = [text == p.answer for text, p in zip(texts, problems, strict=True)]
    early = [len(text) < len(p.answer) for text, p in zip(texts, problems, strict=True)]
    steps = sum(r.steps for r in records)
    return Result(
        claim.name,
        options,
        100 * sum(marks) / len(marks),
        sum(orders) / max(1, len(orders)),
        100 * sum(early) / len(early),
        100 * sum(r.rows for r in records) / sum(r.full_rows for r in records),
        sum(len(r.output or []) for r in records) / steps,
        "".join("01"[mark] for mark in marks),
    )


def from_first(result: Result, results: list[Result]) -> Difference | None:
    """Right answers against those of the claim's first setting; None for that setting itself."""
    first = next(other for other in results if other.claim == result.claim)
    return None if first is result else difference([m == "1" for m in result.marks], [m == "1" for m in first.marks])


def markdown(results: list[Result]) -> str:
    """A table for each claim."""
    heads = ("setting", "right, %", "difference, points", "p", "order", "early end, %", "rows, %", "tokens/forward")
    lines = []
    for claim in CLAIMS:
        lines += [f"### {claim.name[0].upper()}{claim.name[1:]}", "", claim.said, ""]
        lines += ["| " + " | ".join(heads) + " |", "|---" + "|---:" * (len(heads) - 1) + "|"]
        for result in (r for r in results if r.claim == claim.name):
            found = from_first(result, results)
            paired = [str(found), f"{found.p_value:.2g}"] if found else ["", ""]
            numbers = (f"{result.order:.2f}", f"{result.early:.1f}", f"{result.rows:.0f}")
            row = (result.label, f"{result.score:.1f}", *paired, *numbers, f"{result.tokens_per_forward:.2f}")
            lines.append("| " + " | ".join(row) + " |")
        lines.append("")
    return "\n".join(lines)


def plot(results: list[Result], path: Path) -> None:
    """One panel a claim, one line a setting: right answers, with the interval of the difference from the first line."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    said = {"order": "order {:.2f}", "rows": "{:.0f} % of rows", "tokens_per_forward": "{:.1f} tokens a forward"}
    figure, axes = pyplot.subplots(2, 2, figsize=(13, 6.5), sharex=True)
    for claim, panel in zip(CLAIMS, axes.flat, strict=True):
        lines = [r for r in results if r.claim == claim.name]
        for place, result in enumerate(lines):
            found = from_first(result, results)
            low, high = found.interval if found else (0.0, 0.0)
            points = found.points if found else 0.0
            error = [[points - low], [high - points]]
            panel.errorbar(result.score, -place, xerr=error, marker="o", capsize=3, color="C0" if found else "black")
        panel.axvline(lines[0].score, color="black", linewidth=0.5)
        labels = [f"{r.label}\n{said[claim.x].format(getattr(r, claim.x))}" for r in lines]
        panel.set_yticks([-place for place in range(len(lines))], labels, fontsize=8)
        panel.set(title=claim.name)
        panel.tick_params(labelbottom=True)
    for panel in axes[-1]:
        panel.set_xlabel("right, %; bars: 95 % interval of the difference from the first line")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main() -> None:
    """Run every setting, print the tables, write them, the picture and the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="models/tiny-llada")
    parser.add_argument("--problems", type=int, default=500)
    parser.add_argument("--batch", type=int, default=32, help="requests at a time (default: 32)")
    parser.add_argument("--redraw", action="store_true", help="only the picture, from the figures that are there")
    parser.add_argument("--out", type=Path, help="without suffix (default: benchmarks/results/claims_MODEL)")
    args = parser.parse_args()
    out = args.out or Path("benchmarks/results") / f"claims_{Path(args.model).name}"
    if args.redraw:
        found = json.loads(out.with_suffix(".json").read_text())["results"]
        plot([Result(**fields) for fields in found], out.with_suffix(".png"))
        return
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from tqdm import tqdm
    from vllm import LLM

    problems = held_out(args.problems)
    with tempfile.TemporaryDirectory(prefix="d2cache-claims-") as scratch:
        section = {"d2cache": {"trace_dir": scratch}}
        llm = LLM(args.model, max_num_seqs=args.batch, dtype="float32", additional_config=section)
        wanted = [(claim, options) for claim in CLAIMS for options in claim.settings]
        results = [measure(llm, problems, *pair, Path(scratch)) for pair in tqdm(wanted, unit="setting")]
    facts = machine()
    note = f"{args.model}, {args.problems} held-out problems, float32, greedy; {caption(facts)}"
    print(markdown(results), note, sep="\n")
    out.with_suffix(".md").write_text(f"{markdown(results)}\n{note}\n")
    record = {"machine": facts, "model": args.model, "results": [asdict(r) for r in results]}
    out.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    plot(results, out.with_suffix(".png"))


if __name__ == "__main__":
    main()
