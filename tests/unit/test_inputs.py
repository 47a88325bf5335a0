"""docs/inputs.md: each input that failed has a test, and the test is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LINES = (ROOT / "docs/inputs.md").read_text().splitlines()
# A table's heading is the line before its rule.
ROWS = [
    line for line, below in zip(LINES, [*LINES[1:], ""], strict=True) if line.startswith("| ") and below[:4] != "|---"
]
TESTS = [(file, name) for row in ROWS for file, name in re.findall(r"`(tests/[\w/]+\.py)`: `(test_\w+)`", row)]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[2:40])
def test_every_row_names_a_test(row: str) -> None:
    assert row.count(" | ") == 3
    assert "`: `test_" in row or "`make dist`" in row


@pytest.mark.parametrize(("file", "name"), sorted(set(TESTS)))
def test_the_test_is_there(file: str, name: str) -> None:
    assert re.search(rf"^def {name}\(", (ROOT / file).read_text(), re.MULTILINE)
