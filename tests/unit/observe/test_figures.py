"""Figures of a request and totals of all: every row and commit is counted once."""

from __future__ import annotations

from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_d2cache.observe.figures import TOTALS, RequestFigures, Totals
from vllm_d2cache.options.types import OptionError
from vllm_d2cache.requests.asked import Asked


def test_a_request_by_hand() -> None:
    totals = Totals()
    figures = RequestFigures("d2cache", total_len=30, canvas_len=10)
    # 30 rows of 30, then 8 of 12 reserved, then 12 of 12.
    for rows, commits, reserved in ((30, 4, 30), (8, 5, 12), (12, 1, 12)):
        figures.observe(rows, commits, reserved, totals)
    assert figures.report(10) == {
        "policy": "d2cache",
        "steps": 3,
        "tokens": 10,
        "tokens_per_step": 3.3333,
        "rows_refreshed": 50,
        "rows_saved": 40,
        "saved_share": 0.4444,
    }
    assert asdict(totals["d2cache"]) == {
        "steps": 3,
        "rows_refreshed": 50,
        "rows_saved": 40,
        "rows_reserved": 24,
        "rows_used": 20,
        "commits": 10,
        "canvases": 1,
        "canvas_slots": 30,
        "first_canvas_slots": 10,
    }


def test_a_step_with_more_rows_than_positions_saves_none() -> None:
    """With shadows. A counter cannot shrink, so such a step does not take back what others saved."""
    totals = Totals()
    figures = RequestFigures("full", total_len=30, canvas_len=10)
    for rows in (30, 38, 20):
        figures.observe(rows, 1, 38, totals)
    assert figures.report(3)["rows_saved"] == totals["full"].rows_saved == 10
    assert totals["full"].rows_refreshed == 88


def test_policies_are_counted_apart() -> None:
    totals = Totals()
    for policy in ("d2cache", "full", "full"):
        RequestFigures(policy, 5, 3).observe(5, 3, 5, totals)
    assert totals["full"].steps == 2
    assert totals["d2cache"].steps == 1
    named = totals.by_name()
    assert set(named) == {(policy, name) for policy in ("d2cache", "full") for name in TOTALS}
    assert (named["full", "commits"], named["d2cache", "canvases"]) == (6, 1)


def test_a_request_that_never_ran_has_figures() -> None:
    assert RequestFigures("full", 5, 3).report(0)["tokens_per_step"] == 0.0


def test_the_arithmetic_of_vllms_benchmark() -> None:
    """benchmarks/serve.py: canvas length = positions / steps, canvases = tokens / length, the rest are steps."""
    totals = Totals()
    for steps in (1, 4, 16):  # one of them is done in a single step
        figures = RequestFigures("d2cache", 40, 16)
        for n in range(steps):
            figures.observe(40 if n == 0 else 9, 16 // steps, 12, totals)
    counted = asdict(totals["d2cache"])
    steps = counted["steps"] + counted["canvases"]
    length = (counted["canvas_slots"] + counted["first_canvas_slots"]) / steps
    canvases = counted["commits"] / length
    assert (length, canvases, steps - canvases) == (16, 3, 21)


def asked(extra_args: dict[str, Any] | None) -> Asked:
    return Asked.of(SimpleNamespace(extra_args=extra_args, structured_outputs=None))


@pytest.mark.parametrize(("value", "wants"), [(True, True), (1, True), (0, False), (False, False)])
def test_report_is_asked_for(value: object, wants: bool) -> None:
    assert asked({"d2cache_report": value}).report is wants
    assert not asked(None).report


@pytest.mark.parametrize("value", ["yes", 2, -1, 0.5, 1.0, [1], None])
def test_bad_report_is_refused(value: object) -> None:
    with pytest.raises(OptionError, match=r"^d2cache_report: must be true or false"):
        asked({"d2cache_report": value})
