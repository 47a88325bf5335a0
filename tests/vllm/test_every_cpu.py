"""What is loaded and computed does not depend on the instructions that a CPU has: run again where it has few.

The other side, a CPU that packs weights, is forced in process (`linear_layers` in conftest.py).
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.vllm

ROOT = Path(__file__).resolve().parents[2]
# The oldest that PyTorch's and oneDNN's kernels have code for.
OLDEST = {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41"}
AGAIN = (
    "tests/vllm/test_damaged_weights.py",
    "tests/vllm/test_published_tensors.py",
    "-k",
    "value_projection or (one_bad_number and plain and q_proj) or (last_number and dream)",
)


def test_it_is_in_force() -> None:
    """Else the run below would prove nothing."""
    code = "import torch; print(torch.backends.cpu.get_cpu_capability())"
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, **OLDEST}, capture_output=True, text=True)
    assert done.stdout.strip() == "DEFAULT", done.stderr


def test_weights_are_read_and_judged_as_on_any_other(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        f"--basetemp={tmp_path / 'again'}",
        *AGAIN,
    ]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **OLDEST}, capture_output=True, text=True)
    last = done.stdout.strip().splitlines()[-1]
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in last and "skipped" not in last, last
