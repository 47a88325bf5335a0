"""The table of supported vLLM releases: what counts as failed, and which releases are in it."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tools.test_matrix import RELEASES, SUITES, Result, count, read_junit, table

JUNIT = """<testsuites><testsuite>
<testcase name="a" time="1"/>
<testcase name="b"><failure message="no"/></testcase>
<testcase name="c"><error message="no"/></testcase>
<testcase name="d"><skipped message="no GPU"/></testcase>
<testcase name="e"><system-out>words</system-out></testcase>
</testsuite></testsuites>"""


def test_counts_are_those_of_the_report(tmp_path: Path) -> None:
    path = tmp_path / "report.xml"
    path.write_text(JUNIT)
    assert read_junit(path) == (2, 2, 1)


@pytest.mark.parametrize(("code", "failed", "want"), [(0, 0, 0), (1, 3, 3), (5, 0, 1), (-11, 0, 1)])
def test_a_suite_that_ends_badly_has_failed(code: int, failed: int, want: int) -> None:
    assert count("0.31.0", "vllm", code, (7, failed, 0), 1.0).failed == want


def test_the_table_has_a_line_for_each_result() -> None:
    lines = table([Result("0.31.0", "unit", 10, 0, 2, 1.6), Result("0.32.0", "e2e", 9, 1, 0, 100.0)]).splitlines()
    assert lines[0].split(" | ")[1].strip() == "suite"
    assert [cell.strip() for cell in lines[3].strip("|").split("|")] == ["0.32.0", "e2e", "9", "1", "0", "100"]
    assert len(lines) == 4
    assert len({len(line) for line in lines}) == 1


def test_releases_are_inside_the_window() -> None:
    project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
    (window,) = (Requirement(line).specifier for line in project["optional-dependencies"]["cpu"])
    assert all(window.contains(release) for release in RELEASES)
    assert len({release.rpartition(".")[0] for release in RELEASES}) == len(RELEASES)


def test_the_document_has_every_release_and_suite() -> None:
    lines = re.findall(r"^\| (\S+) +\| (\S+) +\| \d+", Path("docs/versions.md").read_text(), re.MULTILINE)
    assert lines == [(release, suite) for release in RELEASES for suite in SUITES]
