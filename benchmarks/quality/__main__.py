"""Scores of a checkpoint under each cache policy and decoding, by lm-evaluation-harness over `vllm serve`.

    python -m benchmarks.quality                                   # the tiny checkpoint's own problems
    python -m benchmarks.quality --model DIR --tasks gsm8k humaneval   # a real checkpoint on published tasks

Starts the server, runs the unmodified harness once for each task and setting, counts steps and rows from the server's
traces, prints a table, and writes JSON, Markdown and plots. docs/reproduce.md says how to repeat the paper's table.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress, TimeElapsedColumn

from benchmarks.machine import caption, machine
from benchmarks.quality.harness import HARNESS, Harness, HarnessError, Score, Setting
from benchmarks.quality.report import markdown, plot, show
from benchmarks.quality.tasks import PUBLISHED, Task, write_tiny_tasks
from tools.serving import ServerError, server

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"


def settings(policies: list[str], thresholds: list[float]) -> list[Setting]:
    """One token a step, then each confidence threshold, for every policy."""
    found = []
    for policy in policies:
        found.append(Setting(f"{policy}", policy, {"policy": policy}))
        found += [Setting(f"{policy}, threshold {t:g}", policy, {"policy": policy, "threshold": t}) for t in thresholds]
    return found


def run_all(harness: Harness, tasks: list[Task], wanted: list[Setting], scratch: Path, console: Console) -> list[Score]:
    """Every task under every setting."""
    scores = []
    with Progress(*Progress.get_default_columns(), TimeElapsedColumn(), console=console) as progress:
        bar = progress.add_task("settings", total=len(tasks) * len(wanted))
        for task in tasks:
            for setting in wanted:
                progress.update(bar, description=f"{task.name}: {setting.name}")
                scores.append(harness.run(task, setting, scratch))
                progress.advance(bar)
    return scores


def parse() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--model", default="models/tiny-llada", help="checkpoint (default: models/tiny-llada)")
    parser.add_argument(
        "--tasks", nargs="+", default=["tiny"], choices=["tiny", *PUBLISHED], help="what to ask (default: tiny)"
    )
    parser.add_argument("--policies", nargs="+", default=["full", "d2cache"], help="cache policies")
    parser.add_argument("--thresholds", nargs="*", type=float, default=[0.9, 0.7], help="besides one token a step")
    parser.add_argument("--setting", action="append", default=[], metavar="NAME=JSON", help="a further setting")
    parser.add_argument("--completions", action="store_true", help="/v1/completions, for base models; else chat")
    parser.add_argument("--concurrency", type=int, default=8, help="requests in flight (default: 8)")
    parser.add_argument("--limit", type=int, help="problems a task at most")
    parser.add_argument("--problems", type=int, default=504, help="how many for the task tiny (default: 504)")
    parser.add_argument("--dtype", help="passed to vllm serve")
    parser.add_argument("--out", type=Path, help="results, .json (default: benchmarks/results/quality_MODEL.json)")
    return parser.parse_args()


def extra_setting(text: str) -> Setting:
    """NAME=JSON from the command line."""
    name, _, options = text.partition("=")
    values: dict[str, Any] = json.loads(options)
    return Setting(name, name, values)


def chat_renderer(model: str) -> Callable[[str], str]:
    """Renders a user's message by the checkpoint's chat template, without what the tokenizer adds by itself."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(model)
    added = tokenizer.decode(tokenizer("").input_ids)

    def render(text: str) -> str:
        chat = [{"role": "user", "content": text}]
        rendered = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        return str(rendered).removeprefix(added)

    return render


def main() -> int:
    """Run and write."""
    args = parse()
    console = Console(width=200 if not sys.stdout.isatty() else None)
    if not HARNESS.exists():
        console.print(f"{HARNESS} is missing; `make eval` installs it", style="red")
        return 1
    wanted = settings(args.policies, args.thresholds) + [extra_setting(text) for text in args.setting]
    name = Path(args.model).name
    out = args.out or RESULTS / f"quality_{name}.json"
    arguments = ("--served-model-name", name, *(("--dtype", args.dtype) if args.dtype else ()))
    with tempfile.TemporaryDirectory(prefix="d2cache-quality-") as directory:
        traces, scratch = Path(directory) / "traces", Path(directory) / "scratch"
        traces.mkdir()
        scratch.mkdir()
        render = chat_renderer(args.model) if args.completions else str
        tasks = [write_tiny_tasks(scratch, args.problems, render) if t == "tiny" else PUBLISHED[t] for t in args.tasks]
        try:
            with server(args.model, traces, console, arguments) as url:
                harness = Harness(url, name, traces, not args.completions, args.concurrency, args.limit, scratch)
                scores = run_all(harness, tasks, wanted, scratch, console)
        except (ServerError, HarnessError) as error:
            console.print(str(error), style="red", markup=False)
            return 1
    facts = machine()
    show(scores, console)
    console.print(caption(facts))
    note = f"{'completions' if args.completions else 'chat'}, concurrency {args.concurrency}; {caption(facts)}"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({"machine": facts, "scores": [asdict(s) for s in scores]}, indent=1) + "\n")
    out.with_suffix(".md").write_text(markdown(scores, note))
    plot(scores, out)
    console.print(f"written to {out} and beside it")
    return 0


if __name__ == "__main__":
    sys.exit(main())
