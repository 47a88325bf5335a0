"""The table of supported vLLM releases: what counts as failed, and which releases are in it."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

with pytest.MonkeyPatch.context() as patch:  # tools import each other by their own names
    patch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "tools"))
    import test_cuda_wheels
    import test_matrix
    from test_matrix import RELEASES, SUITES, Result, count, read_junit, results_of, table

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


@pytest.mark.parametrize(
    ("extra", "releases"), [("cpu", RELEASES), ("cuda", test_cuda_wheels.RELEASES)], ids=["cpu", "cuda"]
)
def test_releases_are_inside_the_window(extra: str, releases: tuple[str, ...]) -> None:
    project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
    (window,) = (Requirement(line).specifier for line in project["optional-dependencies"][extra])
    assert all(window.contains(release) for release in releases)
    assert len({release.rpartition(".")[0] for release in releases}) == len(releases)


def test_every_release_of_the_window_has_a_table() -> None:
    minors = {release.rpartition(".")[0] for release in (*RELEASES, *test_cuda_wheels.RELEASES)}
    assert minors == {"0.31", "0.32", "0.33"}


def test_the_document_has_every_release_and_suite() -> None:
    lines = re.findall(r"^\| (\S+) +\| (\S+) +\| \d+", Path("docs/versions.md").read_text(), re.MULTILINE)
    on_cpu = [(release, suite) for release in RELEASES for suite in SUITES]
    cuda = [(release, suite) for release in test_cuda_wheels.RELEASES for suite in test_cuda_wheels.SUITES]
    assert lines == on_cpu + cuda


def test_what_runs_on_cuda_builds_is_there() -> None:
    for words in test_cuda_wheels.SUITES.values():
        assert all(Path(word).exists() for word in words if word.startswith("tests/"))
    assert set(test_cuda_wheels.SETTINGS) <= set(test_cuda_wheels.SUITES)


def test_an_environment_that_cannot_be_built_is_a_failure_and_the_next_is_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, dict[str, str]]] = []

    def build(release: str, backend: str) -> Path:
        assert backend == "cuda"
        if release == "0.32.0":
            raise subprocess.CalledProcessError(1, "make_env")
        return tmp_path

    def run(venv: Path, release: str, suite: str, words: list[str], settings: dict[str, str]) -> Result:
        asked.append((suite, settings))
        return Result(release, suite, 1, 0, 0, 1.0)

    monkeypatch.setattr(test_matrix, "build", build)
    monkeypatch.setattr(test_matrix, "run", run)
    found = results_of(["0.32.0", "0.33.0"], "cuda", {"contract": [], "vllm": []}, test_cuda_wheels.SETTINGS)
    assert [(result.suite, result.failed) for result in found] == [("environment", 1), ("contract", 0), ("vllm", 0)]
    assert asked == [("contract", {}), ("vllm", {"VLLM_TARGET_DEVICE": "cpu"})]
