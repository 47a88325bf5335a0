"""What has been measured so far, in a file that a later run goes on from; and the paper's table with it filled in."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.quality.harness import Score, Setting

# The rows of the paper's table. Its baselines decode in windows of 32 and without the certainty prior.
_BASELINE = {"window": 32, "sigma": 0}
SETTINGS = tuple(
    Setting(name, name, {"policy": policy, **options})
    for name, policy, options in (
        ("full", "full", _BASELINE),
        ("dLLM-Cache", "dllm_cache", _BASELINE),
        ("Fast-dLLM (prefix)", "prefix", _BASELINE),
        ("d2cache", "d2cache", {}),
    )
)
# How the first column of docs/reproduce.md begins for each task, and the column of each family's own figures.
ROWS = {"gsm8k": "GSM8K", "humaneval": "HumanEval", "humaneval_instruct": "HumanEval", "mbpp": "MBPP"}
COLUMNS = {"LLaDAModelLM": 4, "DreamModel": 6}


class Record:
    """One line of JSON for each task and setting that is done.

    Args:
        path: the file; absent = nothing is done yet.
        about: what all of a run's scores have in common (model, limit, ...). Lines of other runs are left alone.
    """

    def __init__(self, path: Path, about: dict[str, Any]) -> None:
        self.path, self.about = path, about
        self.scores: dict[tuple[str, str], Score] = {}
        for line in path.read_text().splitlines() if path.exists() else []:
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:
                continue  # the machine went down while this line was being written
            if entry["about"] == about:
                score = Score(**entry["score"])
                self.scores[score.task, score.setting] = score

    def add(self, score: Score) -> None:
        """Write one score, at once."""
        self.scores[score.task, score.setting] = score
        # On a line of its own even behind half a line.
        torn = self.path.exists() and not self.path.read_bytes().endswith(b"\n")
        with self.path.open("a") as sink:
            sink.write("\n" * torn + json.dumps({"about": self.about, "score": asdict(score)}) + "\n")


def filled(document: str, scores: Iterable[Score], column: int) -> str:
    """The paper's table in docs/reproduce.md with "tokens a second / score" of these scores.

    Args:
        document: the text of the page.
        scores: of tasks in `ROWS`, under their own names or those of local files; others have no row.
        column: which one, counted as in `"| a | b |".split("|")`.
    """
    cells = {
        (ROWS[task], s.setting): f"{s.tokens_per_second:.2f} / {s.score:.1f}"
        for s in scores
        if (task := s.task.removesuffix("_local")) in ROWS
    }
    lines, current = document.split("\n"), ""
    for number, line in enumerate(lines):
        parts = line.split("|")
        if len(parts) != 8:
            continue
        current = parts[1].split(",")[0].strip() or current
        if cell := cells.get((current, parts[2].strip())):
            parts[column] = f" {cell} "
            lines[number] = "|".join(parts)
    return "\n".join(lines)
