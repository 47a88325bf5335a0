"""A step asks no more of a device than ``make count`` has written down."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.count.__main__ import SETTINGS, measure

WRITTEN = json.loads((Path(__file__).parents[3] / "benchmarks" / "results" / "count.json").read_text())
LINES = [line for line in WRITTEN if line["setting"] in SETTINGS and line["batch"] in (1, 8)]


@pytest.mark.parametrize("line", LINES, ids=lambda line: f"{line['setting']}-{line['batch']}-{line['form']}")
def test_no_step_has_more_kernels_or_waits_than_documented(line: dict[str, Any]) -> None:
    found = measure([SETTINGS[line["setting"]]] * line["batch"], line["form"] == "padded")
    assert found["kernels"] <= line["kernels"]
    assert found["triton"] <= line["triton"]
    assert found["waits"] <= line["waits"]


def test_padded_steps_wait_for_nothing_and_exact_ones_once() -> None:
    default = [line for line in WRITTEN if line["setting"].startswith(("d2cache", "full"))]
    assert {(line["form"], line["waits"]) for line in default} == {("padded", 0), ("exact", 1)}
