"""What requests cost: the figures of one request, and the totals since they were last read.

The scheduler keeps them: it knows the steps and the rows it reserved, and the worker tells it after each step how many
rows were really computed and how many tokens committed.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

# Names of the totals, one of each for every policy.
TOTALS = (
    "steps",  # of all requests together
    "rows_refreshed",  # rows computed, those that verify included
    "rows_saved",  # rows that full recompute would have computed besides; none in a step with more rows than that
    "rows_reserved",  # reserved for steps after a request's first
    "rows_used",  # computed of these
    "commits",  # tokens committed, less those taken back
    "canvases",  # requests that ran their first step
    "canvas_slots",  # canvas length, added in each step
    "first_canvas_slots",  # canvas length, added in first steps alone
)


@dataclass
class RequestFigures:
    """One request's figures so far; a preemption adds to them, as the work is done again."""

    policy: str
    total_len: int  # T
    canvas_len: int  # G
    steps: int = 0
    rows: int = 0
    saved: int = 0
    commits: int = 0

    def observe(self, rows: int, commits: int, reserved: int, totals: Counter[tuple[str, str]]) -> None:
        """Add a step, here and to ``totals``."""
        first = self.steps == 0
        saved = max(0, self.total_len - rows)
        self.steps += 1
        self.rows += rows
        self.saved += saved
        self.commits += commits
        step = {
            "steps": 1,
            "rows_refreshed": rows,
            "rows_saved": saved,
            "rows_reserved": 0 if first else reserved,
            "rows_used": 0 if first else rows,
            "commits": commits,
            "canvases": int(first),
            "canvas_slots": self.canvas_len,
            "first_canvas_slots": self.canvas_len if first else 0,
        }
        for name, value in step.items():
            totals[self.policy, name] += value

    def observe_fill(self, rows: int, totals: Counter[tuple[str, str]]) -> None:
        """Add rows of a prompt that were computed before its first step: they cost, and are no step."""
        self.rows += rows
        totals[self.policy, "rows_refreshed"] += rows

    def report(self, num_tokens: int) -> dict[str, Any]:
        """What the client is told; ``num_tokens`` were emitted."""
        everything = self.steps * self.total_len
        return {
            "policy": self.policy,
            "steps": self.steps,
            "tokens": num_tokens,
            "tokens_per_step": round(num_tokens / self.steps, 4) if self.steps else 0.0,
            "rows_refreshed": self.rows,
            "rows_saved": self.saved,
            "saved_share": round(self.saved / everything, 4) if everything else 0.0,
        }
