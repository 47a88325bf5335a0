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
from vllm_d2cache.cli.paired import difference

HEADS = (
    "task",
    "setting",
    "score, %",
    "difference, points",
    "from",
    "p",
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

PAIRED = (
    "Score: with the half width of its 95 % interval. Difference: on the same problems, with the 95 % interval of "
    "paired differences (Bonett and Price); p: McNemar's exact test."
)


def reference(score: Score, scores: Sequence[Score]) -> Score | None:
    """What a setting is compared with: full recompute that decodes the same way, as far as it was run.

    It is the setting of full recompute which shares most options and has none of its own besides; where there is none,
    the first of full recompute. Full recompute with options of decoding is compared with full recompute without them.
    """
    full = [s for s in scores if s.task == score.task and s.options.get("policy") == "full"]
    own = {name: value for name, value in score.options.items() if name != "policy"}
    found: tuple[int, Score] | None = None
    for other in full:
        options = {name: value for name, value in other.options.items() if name != "policy"}
        fits = other.setting != score.setting and options.items() <= own.items()
        if fits and (found is None or len(options) > found[0]):
            found = len(options), other
    if found:
        return found[1]
    return full[0] if full and score.options.get("policy") != "full" else None


def compared(score: Score, scores: Sequence[Score]) -> list[str]:
    """The cells of the paired difference; empty where there is nothing to compare with."""
    other = reference(score, scores)
    if other is None or not score.marks or len(score.marks) != len(other.marks):
        return ["", "", ""]
    found = difference([m == "1" for m in score.marks], [m == "1" for m in other.marks])
    return [str(found), other.setting, f"{found.p_value:.2g}"]


def cells(score: Score, scores: Sequence[Score] = ()) -> list[str]:
    """One line as text; `scores` has what it is compared with."""
    return [
        score.task,
        score.setting,
        f"{score.score:.1f} ± {score.interval:.1f}",
        *compared(score, scores),
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
        table.add_row(*cells(score, scores))
    console.print(table)
    for (task, curve), figure in accuracy_under_parallelism(scores).items():
        console.print(f"AUP of {curve} on {task}: {figure:.1f}")


def markdown(scores: Sequence[Score], note: str) -> str:
    """The table for the documents."""
    lines = ["| " + " | ".join(HEADS) + " |", "|---" * len(HEADS) + "|"]
    lines += ["| " + " | ".join(cells(s, scores)) + " |" for s in scores]
    lines += ["", "| task | curve | AUP |", "|---|---|---|"]
    lines += [f"| {t} | {c} | {v:.1f} |" for (t, c), v in accuracy_under_parallelism(scores).items()]
    return "\n".join([*lines, "", PAIRED, "", note, ""])


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
