"""GPU tests: kernels, then the engine. Fails where a GPU exists and one of the groups has run nothing on it.

Without a GPU it says so and ends well: there is nothing to test. What has passed is noted with a fingerprint of the
source, so that the benchmark need not run it again. On a bare machine: tools/bare_gpu.sh.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
KERNELS = {
    "kernels": [
        "tests/triton",
        "--ignore=tests/triton/test_compiles_for_hopper.py",
        "--ignore=tests/triton/test_ptx.py",
        "--ignore=tests/triton/test_warps.py",
    ]
}
# The tests that run on CPU elsewhere: vLLM puts their engines on the GPU. A process for each engine.
ENGINE = {
    "engine": [
        "tests/e2e/test_gpu.py",
        "tests/e2e/test_memory.py",
        "tests/e2e/test_traces.py",
        "tests/e2e/test_independence.py",
        "tests/e2e/test_policies.py::test_one_batch_of_all_policies_as_in_the_reference",
        "tests/e2e/test_gpu_benchmark.py",
    ],
    "Dream": ["tests/e2e/test_dream.py"],
    "CUDA graphs": ["tests/e2e/test_gpu_graphs.py"],
}


NOTE = ROOT / "build/gpu_tests_passed.json"


def fingerprint() -> str:
    """Of the package and the tests: no git where only the working tree has been carried."""
    digest = hashlib.sha256()
    for path in sorted([*ROOT.glob("vllm_d2cache/**/*.py"), *ROOT.glob("tests/**/*.py")]):
        digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def passed_before(device: str, no_engine: bool, note: Path = NOTE) -> bool:
    """Whether these tests have passed with this source on such a device."""
    if not note.exists():
        return False
    noted = json.loads(note.read_text())
    wanted = KERNELS if no_engine else {**KERNELS, **ENGINE}
    return (noted["source"], noted["device"]) == (fingerprint(), device) and set(wanted) <= set(noted["groups"])


class Outcome(NamedTuple):
    """Of one call of pytest."""

    code: int
    passed: int
    skipped: list[str]  # reasons


def run_pytest(arguments: list[str]) -> Outcome:
    """In a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", *arguments, "-q", "-p", "no:cacheprovider", f"--junitxml={report}"]
        # Kernels on the GPU, not in the interpreter.
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        code = subprocess.run(command, check=False, cwd=ROOT, env=environment).returncode
        cases = ET.parse(report).findall(".//testcase") if report.exists() else []
    skipped = [case[0].get("message", "") for case in cases if len(case) and case[0].tag == "skipped"]
    failed = [case for case in cases if any(part.tag in ("failure", "error") for part in case)]
    return Outcome(code, len(cases) - len(skipped) - len(failed), skipped)


def problems_of(group: str, outcome: Outcome) -> list[str]:
    """Why a group of tests is not good enough."""
    if outcome.code:
        return [f"{group}: pytest ended with exit code {outcome.code}"]
    if not outcome.passed:
        return [f"{group}: no test has run: {'; '.join(sorted(set(outcome.skipped))) or 'none was found'}"]
    return []


def main(
    arguments: list[str], device: str | None, run: Callable[[list[str]], Outcome] = run_pytest, note: Path = NOTE
) -> int:
    """The exit code.

    Args:
        device: name of the GPU; None = there is none.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--no-engine", action="store_true", help="kernels alone: needs no vLLM")
    args = parser.parse_args(arguments)
    if device is None:
        print("SKIPPED: torch finds no GPU. Not one GPU test has run.", file=sys.stderr)
        return 0
    groups = KERNELS if args.no_engine else {**KERNELS, **ENGINE}
    if not args.no_engine and importlib.util.find_spec("vllm") is None:
        print("FAILED: vLLM is not installed; --no-engine tests the kernels alone", file=sys.stderr)
        return 1
    lines, problems = [], []
    for group, paths in groups.items():
        outcome = run(paths)
        lines.append(f"{group}: {outcome.passed} passed, {len(outcome.skipped)} skipped")
        problems += problems_of(group, outcome)
    print("\n".join([*lines, *(f"FAILED: {problem}" for problem in problems)]))
    if problems:
        return 1
    note.parent.mkdir(parents=True, exist_ok=True)
    note.write_text(json.dumps({"source": fingerprint(), "device": device, "groups": list(groups)}) + "\n")
    return 0


if __name__ == "__main__":
    import torch

    sys.exit(main(sys.argv[1:], torch.cuda.get_device_name() if torch.cuda.is_available() else None))
