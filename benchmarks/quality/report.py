"""Tables and pictures of what the harness found."""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.quality.aup import aup
from benchmarks.quality.harness import Score

HEADS = (
    "task",
    "setting",
    "score, %",
    "requests",
    "output tokens",
    "canvas tokens",
    "committed tokens",
    "steps",
    "tokens/forward",
    "rows/forward",
    "of full's rows",
    "seconds",
    "tokens/s",
)


def cells(score: Score) -> list[str]:
    """One line as text."""
    return [
        score.task,
        score.setting,
        f"{score.score:.1f} ± {score.interval:.1f}",
        str(score.requests),
        str(score.output_tokens),
        str(score.canvas_tokens),
        str(score.committed_tokens),
        str(score.steps),
        f"{score.tokens_per_forward:.2f}",
        f"{score.rows_per_forward:.1f}",
        f"{100 * score.row_share:.0f} %",
        f"{score.seconds:.0f}",
        f"{score.tokens_per_second:.0f}",
    ]


def accuracy_under_parallelism(scores: Sequence[Score]) -> dict[tuple[str, str], float]:
    """AUP of every (task, curve): the settings of a curve are its points."""
    curves: dict[tuple[str, str], list[tuple[float, float]]] = defaultdict(list)
    best: dict[str, float] = defaultdict(float)
    for s in scores:
        curves[s.task, s.curve].append((s.tokens_per_forward, s.score))
        best[s.task] = max(best[s.task], s.score)
    return {key: aup(points, best[key[0]]) for key, points in curves.items() if best[key[0]] > 0}


def show(scores: Sequence[Score], console: Console) -> None:
    """Print the table."""
    table = Table()
    for head in HEADS:
        table.add_column(head, justify="left" if head in HEADS[:2] else "right")
    for score in scores:
        table.add_row(*cells(score))
    console.print(table)
    for (task, curve), figure in accuracy_under_parallelism(scores).items():
        console.print(f"AUP of {curve} on {task}: {figure:.1f}")


def markdown(scores: Sequence[Score], note: str) -> str:
    """The table for the documents."""
    lines = ["| " + " | ".join(HEADS) + " |", "|---" * len(HEADS) + "|"]
    lines += ["| " + " | ".join(cells(s)) + " |" for s in scores]
    lines += ["", "| task | curve | AUP |", "|---|---|---|"]
    lines += [f"| {t} | {c} | {v:.1f} |" for (t, c), v in accuracy_under_parallelism(scores).items()]
    return "\n".join([*lines, "", note, ""])


def plot(scores: Sequence[Score], path: Path) -> None:
    """Score against tokens per second and against tokens per forward, one line a curve; PNG and SVG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    axes_of = (("tokens_per_second", "output tokens a second"), ("tokens_per_forward", "output tokens a forward pass"))
    tasks = list(dict.fromkeys(s.task for s in scores))
    figure, grid = plt.subplots(len(tasks), 2, figsize=(11, 4 * len(tasks)), squeeze=False, sharey="row")
    for task, row in zip(tasks, grid, strict=True):
        for axes, (name, label) in zip(row, axes_of, strict=True):
            for curve in dict.fromkeys(s.curve for s in scores):
                points = sorted(
                    (s for s in scores if (s.task, s.curve) == (task, curve)), key=operator.attrgetter(name)
                )
                x = [getattr(s, name) for s in points]
                error = [s.interval for s in points]
                axes.errorbar(x, [s.score for s in points], yerr=error, marker="o", capsize=3, label=curve)
            axes.set_xlabel(label)
        row[0].set_ylabel(f"{task}: score, %")
        row[0].legend()
    figure.tight_layout()
    for suffix in (".png", ".svg"):
        figure.savefig(path.with_suffix(suffix), dpi=120)
    plt.close(figure)
