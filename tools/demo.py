"""Serve the tiny checkpoint with `vllm serve` and compare d2Cache with full recompute on real chat requests.

    python tools/demo.py          # or: make demo

Starts the server on a free port, sends the same questions twice (d2Cache, then every position recomputed in every
step) with the OpenAI client, one request at a time, and prints answers, steps, recomputed rows and times. The network
is made wider first (widen.py): it says the same, and is most of a step, as the networks are that people serve.
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import openai
from rich.console import Console
from rich.markup import escape
from rich.rule import Rule
from rich.table import Table

from serving import ServerError, server
from tiny_tasks import Problem, held_out
from traces import Trace, find
from widen import widen

ROOT = Path(__file__).resolve().parent.parent
POLICIES = {"d2cache": "d2Cache", "full": "full"}
TIMES = 4
QUESTIONS = (("copy", 128), ("range", 128), ("replace", 32), ("upper", 32), ("sort", 32), ("fewshot", 0))
"""Kinds of question, each with the smallest canvas it is asked with: two of them are long."""


@dataclass(frozen=True)
class Answer:
    """One response and what it cost."""

    text: str
    tokens: int
    seconds: float
    trace: Trace


def questions(seed: int) -> list[Problem]:
    """The first held-out problem of each of QUESTIONS, in their order."""
    found = []
    for kind, canvas in QUESTIONS:
        drawn = held_out(50, seed=seed, kinds=(kind,))
        found.append(next(problem for problem in drawn if problem.canvas >= canvas))
    return found


# --- the requests -------------------------------------------------------------------------------------------------


class Asker:
    """Sends one chat request at a time."""

    def __init__(self, url: str, traces: Path) -> None:
        self.client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", timeout=120, max_retries=0)
        self.model = self.client.models.list().data[0].id
        self.traces = traces

    def ask(self, problem: Problem, policy: str, on_text: Callable[[str], None] | None = None) -> Answer:
        """One question under one cache policy; streamed if `on_text` is given. d2Cache is the server's default."""
        request = {
            "model": self.model,
            "messages": [{"role": "user", "content": problem.prompt}],
            "max_tokens": problem.canvas,
            "extra_body": {} if policy == "d2cache" else {"vllm_xargs": {"d2cache_policy": policy}},
        }
        begin = time.perf_counter()
        if on_text is None:
            response = self.client.chat.completions.create(**request)
            identity, usage = response.id, response.usage
            text = response.choices[0].message.content or ""
        else:
            text = ""
            stream = self.client.chat.completions.create(**request, stream=True, stream_options={"include_usage": True})
            for chunk in stream:
                identity, usage = chunk.id, chunk.usage
                piece = (chunk.choices[0].delta.content or "") if chunk.choices else ""
                text += piece
                on_text(piece)
        seconds = time.perf_counter() - begin
        return Answer(text, usage.completion_tokens, seconds, find(self.traces, identity))


def ask_all(asker: Asker, problems: list[Problem], console: Console) -> list[dict[str, Answer]]:
    """Every question under every policy, the first one streamed. A request a policy goes before, untimed."""
    with console.status("warm-up requests ..."):
        for policy in POLICIES:
            asker.ask(held_out(1, seed=5, kinds=("upper",))[0], policy)
    console.print(Rule("one streamed request", align="left"))
    console.print(f"[bold]{escape(problems[0].prompt)}[/bold]")

    def show(piece: str) -> None:
        console.print(piece, end="", markup=False, highlight=False, soft_wrap=True)

    # Streamed under both policies, so that the times compare.
    answers = [{"d2cache": asker.ask(problems[0], "d2cache", show)}]
    console.print()
    answers[0]["full"] = asker.ask(problems[0], "full", lambda piece: None)
    with console.status("") as status:
        for number, problem in enumerate(problems[1:], 2):
            status.update(f"request {number} of {len(problems)} ...")
            answers.append({policy: asker.ask(problem, policy) for policy in POLICIES})
    return answers


# --- the table ----------------------------------------------------------------------------------------------------


def question(problem: Problem) -> str:
    """The question for the table; of a prompt with solved examples, its last line."""
    *examples, last = problem.prompt.splitlines()
    shown = f"({len(examples)} solved examples, such as: {examples[0]}) {last}" if examples else last
    return f"[bold]{escape(shown)}[/bold]"


def replies(by_policy: dict[str, Answer]) -> str:
    """The answer for the table, or one a policy where they differ."""
    texts = {policy: escape(answer.text.strip()) for policy, answer in by_policy.items()}
    if len(set(texts.values())) == 1:
        return f"[dim]both:[/dim] {texts['d2cache']}"
    return "\n".join(f"[dim]{POLICIES[policy]}:[/dim] {text}" for policy, text in texts.items())


def costs(tokens: int, steps: int, rows: int, seconds: float) -> tuple[str, ...]:
    """Cells of one policy."""
    return str(tokens), str(steps), f"{rows:,}", f"{seconds:.2f}", f"{tokens / seconds:.0f}"


def table(problems: list[Problem], answers: list[dict[str, Answer]]) -> Table:
    """One row a question, one line a policy in it, and the totals."""
    grid = Table(show_lines=True, header_style="bold")
    grid.add_column("question and answer", overflow="fold")
    for name in ("policy", "right", "tokens", "steps", "rows", "s", "tok/s"):
        grid.add_column(name, justify="left" if name in ("policy", "right") else "right", no_wrap=True)
    totals = {policy: [0, 0, 0, 0.0] for policy in POLICIES}
    right = dict.fromkeys(POLICIES, 0)
    for problem, by_policy in zip(problems, answers, strict=True):
        lines = []
        for policy, answer in by_policy.items():
            numbers = (answer.tokens, answer.trace.steps, answer.trace.rows, answer.seconds)
            totals[policy] = [total + number for total, number in zip(totals[policy], numbers, strict=True)]
            correct = answer.text.strip() == problem.answer
            right[policy] += correct
            verdict = "[green]yes[/green]" if correct else "[red]no[/red]"
            lines.append((POLICIES[policy], verdict, *costs(*numbers)))
        cells = ["\n".join(column) for column in zip(*lines, strict=True)]
        grid.add_row(question(problem) + "\n" + replies(by_policy), *cells)
    lines = []
    for policy, (tokens, steps, rows, seconds) in totals.items():
        score = f"{right[policy]}/{len(problems)}"
        lines.append((POLICIES[policy], score, *costs(int(tokens), int(steps), int(rows), seconds)))
    grid.add_row("all", *["\n".join(column) for column in zip(*lines, strict=True)], style="bold")
    return grid


def summary(answers: list[dict[str, Answer]]) -> str:
    """One sentence on the totals."""
    rows = {p: sum(by_policy[p].trace.rows for by_policy in answers) for p in POLICIES}
    seconds = {p: sum(by_policy[p].seconds for by_policy in answers) for p in POLICIES}
    same = sum(by_policy["d2cache"].text == by_policy["full"].text for by_policy in answers)
    return (
        f"d2Cache recomputed {rows['d2cache'] / rows['full']:.0%} of the rows of full recompute and took "
        f"{seconds['d2cache'] / seconds['full']:.0%} of its time; {same} of {len(answers)} answers are the same. "
        "Rows: positions sent through the network, added up over the steps. How often each policy is right over "
        "hundreds of such questions: docs/policies.md."
    )


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--model", default="models/tiny-llada", help="checkpoint (default: models/tiny-llada)")
    parser.add_argument("--seed", type=int, default=1, help="which held-out questions (default: 1)")
    parser.add_argument("--times", type=int, default=TIMES, help=f"how much wider it is made (default: {TIMES})")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # end the server then, too
    console = Console()
    if not (ROOT / args.model / "model.safetensors").exists():
        console.print(f"no checkpoint in {args.model}; `make train` trains one", style="red", markup=False)
        return 1
    problems = questions(args.seed)
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="d2cache-demo-") as scratch:
        try:
            wide, traces = f"{Path(args.model).name}-wide", Path(scratch, "traces")
            traces.mkdir()
            widen(ROOT / args.model, Path(scratch, wide), args.times)
            console.print(
                f"{args.model}, made {args.times} times as wide: it says the same (tools/widen.py)", style="dim"
            )
            with server(wide, traces, console, cwd=Path(scratch)) as url:
                answers = ask_all(Asker(url, traces), problems, console)
        except KeyboardInterrupt:
            console.print("interrupted; the server has been stopped")
            return 130
        except (ServerError, openai.OpenAIError, FileNotFoundError, ValueError) as error:
            console.print(str(error), style="red", markup=False)
            return 1
    console.print(Rule("both policies, one request at a time", align="left"))
    console.print(table(problems, answers))
    console.print(summary(answers))
    console.print(f"[dim]{time.monotonic() - begin:.0f} s in all[/dim]")
    return 0


if __name__ == "__main__":
    sys.exit(main())
