"""What requests cost: the figures of one request, and the totals since they were last read.

The scheduler keeps them: it knows the steps and the rows it reserved, and the worker tells it after each step how many
rows were really computed and how many tokens committed.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, fields
from typing import Any


@dataclass(slots=True)
class PolicyTotals:
    """The totals of a policy's requests."""

    steps: int = 0  # of all requests together
    rows_refreshed: int = 0  # rows computed, those that verify included
    rows_saved: int = 0  # that full recompute would have computed besides; none in a step with more rows than that
    rows_reserved: int = 0  # reserved for steps after a request's first
    rows_used: int = 0  # computed of these
    commits: int = 0  # tokens committed, less those taken back
    canvases: int = 0  # requests that ran their first step
    canvas_slots: int = 0  # canvas length, added in each step
    first_canvas_slots: int = 0  # canvas length, added in first steps alone


TOTALS = tuple(field.name for field in fields(PolicyTotals))


class Totals(defaultdict[str, PolicyTotals]):
    """The totals of every policy, by its name."""

    def __init__(self) -> None:
        super().__init__(PolicyTotals)

    def by_name(self) -> dict[tuple[str, str], int]:
        """Each number by policy and name."""
        return {(policy, name): getattr(own, name) for policy, own in self.items() for name in TOTALS}


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

    def observe(self, rows: int, commits: int, reserved: int, totals: Totals) -> None:
        """Add a step, here and to ``totals``."""
        own, canvas = totals[self.policy], self.canvas_len
        saved = max(0, self.total_len - rows)
        if self.steps:
            own.rows_reserved += reserved
            own.rows_used += rows
        else:
            own.canvases += 1
            own.first_canvas_slots += canvas
        self.steps += 1
        own.steps += 1
        self.rows += rows
        own.rows_refreshed += rows
        self.saved += saved
        own.rows_saved += saved
        self.commits += commits
        own.commits += commits
        own.canvas_slots += canvas

    def observe_fill(self, rows: int, totals: Totals) -> None:
        """Add rows of a prompt that were computed before its first step: they cost, and are no step."""
        self.rows += rows
        totals[self.policy].rows_refreshed += rows

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
