"""The d2Cache paper's settings on one checkpoint, over `vllm serve`, by lm-evaluation-harness from local files.

    make reproduce MODEL=DIR TASKS=gsm8k,humaneval DATA=DIR_OF_PROBLEMS

Checks the checkpoint's files, starts the server, runs every task under every setting of the paper's table, and says
how long the rest will take. Each result is written as soon as it is there: after an interruption run the same command
again.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from benchmarks.machine import caption, machine
from benchmarks.quality.harness import HARNESS, Harness, HarnessError, Score, Setting
from benchmarks.quality.report import markdown, show
from benchmarks.quality.tasks import Task
from benchmarks.reproduce.local import LOCAL, MissingError, write_local_task
from benchmarks.reproduce.record import COLUMNS, SETTINGS, Record, filled
from tools.serving import ServerError, server
from vllm_d2cache.doctor.model_directory import check_model

ROOT = Path(__file__).resolve().parents[2]
RESULTS, PAGE = ROOT / "benchmarks" / "results", ROOT / "docs" / "reproduce.md"


def parse() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--model", type=Path, required=True, help="directory of the checkpoint")
    parser.add_argument("--tasks", default="gsm8k,humaneval", help=f"with commas between: {', '.join(LOCAL)}")
    parser.add_argument("--data", type=Path, required=True, help="directory of gsm8k_*.jsonl and HumanEval.jsonl[.gz]")
    parser.add_argument("--completions", action="store_true", help="/v1/completions, for base models; else chat")
    parser.add_argument("--concurrency", type=int, default=1, help="requests in flight (default: 1, the paper's)")
    parser.add_argument("--limit", type=int, help="problems a task at most: a rehearsal")
    parser.add_argument("--canvas", type=int, help="max_tokens in place of the paper's: a rehearsal")
    parser.add_argument("--dtype", default="auto", help="passed to vllm serve (default: auto)")
    parser.add_argument("--fill", action="store_true", help="also write the figures into docs/reproduce.md")
    args = parser.parse_args()
    args.tasks = args.tasks.split(",")
    if unknown := [name for name in args.tasks if name not in LOCAL]:
        parser.error(f"--tasks: no {', '.join(unknown)}; there are {', '.join(LOCAL)}")
    return args


def problems_of(model: Path) -> list[str]:
    """What the doctor finds wrong with the checkpoint's files; memory is the server's to judge."""
    return [f"{f.name}: {f.text}" for f in check_model(model, None) if f.status == "problem"]


class Progressing:
    """Counts finished requests while the harness runs, for the bar and its estimate."""

    def __init__(self, bar: Progress, total: int, traces: Path) -> None:
        self.bar, self.traces, self.done = bar, traces, 0
        self.row = bar.add_task("", total=total)

    def run(self, harness: Harness, task: Task, setting: Setting, scratch: Path, problems: int) -> Score:
        """One task under one setting."""
        self.bar.update(self.row, description=f"{task.name}: {setting.name}")
        ended = threading.Event()
        watcher = threading.Thread(target=self._watch, args=(ended, problems))
        watcher.start()
        try:
            score = harness.run(task, setting, scratch)
        finally:
            ended.set()
            watcher.join()
        self.done += problems
        self.bar.update(self.row, completed=self.done)
        return score

    def _watch(self, ended: threading.Event, problems: int) -> None:
        before = time.time()
        while not ended.wait(1.0):
            # Those of the setting before stand there until the harness's first request.
            new = sum(path.stat().st_mtime > before for path in list(self.traces.glob("*.jsonl")))
            self.bar.update(self.row, completed=self.done + max(0, min(new, problems) - 1))


def run_rest(args: argparse.Namespace, record: Record, console: Console) -> None:
    """Everything that is not in the record yet."""
    name = args.model.resolve().name
    with tempfile.TemporaryDirectory(prefix="d2cache-reproduce-") as directory:
        traces, scratch = Path(directory) / "traces", Path(directory) / "scratch"
        traces.mkdir()
        scratch.mkdir()
        tasks = [write_local_task(task, args.data, scratch) for task in args.tasks]
        tasks = [(replace(t, canvas=args.canvas or t.canvas), min(n, args.limit or n)) for t, n in tasks]
        rest = [(t, s, n) for t, n in tasks for s in SETTINGS if (t.name, s.name) not in record.scores]
        console.print(f"{len(tasks) * len(SETTINGS) - len(rest)} of {len(tasks) * len(SETTINGS)} are done already")
        if not rest:
            return
        arguments = ("--served-model-name", name, "--dtype", args.dtype)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with (
            server(str(args.model.resolve()), traces, console, arguments) as url,
            Progress(*columns, TextColumn("left:"), TimeRemainingColumn(), console=console) as bar,
        ):
            harness = Harness(url, name, traces, not args.completions, args.concurrency, args.limit, scratch)
            progressing = Progressing(bar, sum(n for *_, n in rest), traces)
            for task, setting, problems in rest:
                record.add(progressing.run(harness, task, setting, scratch, problems))


def write(args: argparse.Namespace, record: Record, console: Console) -> None:
    """The table, on the screen and beside the record, and the documents' column if asked for."""
    scores, facts = list(record.scores.values()), machine()
    show(scores, console)
    note = f"{args.model}; {json.dumps(record.about)}; {caption(facts)}"
    console.print(note)
    record.path.with_suffix(".md").write_text(markdown(scores, note))
    architecture = json.loads((args.model / "config.json").read_text())["architectures"][0]
    if args.fill and architecture in COLUMNS:
        PAGE.write_text(filled(PAGE.read_text(), scores, COLUMNS[architecture]))
        console.print(f"filled in: {PAGE}")


def main() -> int:
    """Check, run, write."""
    args = parse()
    console = Console(width=200 if not sys.stdout.isatty() else None)
    found = problems_of(args.model)
    if not HARNESS.exists():
        found.append(f"{HARNESS} is missing; `make reproduce` installs it")
    if found:
        console.print("\n".join(found), style="red", markup=False)
        return 1
    name = args.model.resolve().name
    about = {"model": name, "dtype": args.dtype, "chat": not args.completions, "concurrency": args.concurrency}
    about |= {"limit": args.limit, "canvas": args.canvas}
    record = Record(RESULTS / f"reproduce_{name}.jsonl", about)
    try:
        run_rest(args, record, console)
    except (ServerError, HarnessError, MissingError) as error:
        console.print(str(error), style="red", markup=False)
        return 1
    write(args, record, console)
    return 0


if __name__ == "__main__":
    sys.exit(main())
