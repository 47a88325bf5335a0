"""Run on vLLM's CUDA builds what needs no GPU, each release in an environment of its own.

    python3 tools/test_cuda_wheels.py               # .venv-cuda-0.32.0, .venv-cuda-0.33.0 (9 GB each)
    python3 tools/test_cuda_wheels.py 0.33.0 --suites contract

These are the builds that users with a GPU have. Without a GPU vLLM finds no platform in them, and makes no
configuration of an engine. So there are three suites:

* `contract`: as that is, the files of CONTRACT. They ask what vLLM has and what its classes do, not for a device.
* `vllm`: all of tests/vllm, with VLLM_TARGET_DEVICE=cpu. That is vLLM's own switch: its Python code for CPUs is in
  every build. Configuration, front end, scheduler and loading run by it. Compiled operators for CPUs it has not: a test
  that comes to one is skipped, and says which (tests/vllm/conftest.py).
* `kernels`: our own kernels, compiled for each architecture by the Triton that comes with that build. Each release of
  it is another compiler: none of them may be short of registers.

Nothing here runs on a GPU, and no engine starts. Prints a table at the end, as tools/test_matrix.py does. Standard
library only.
"""

from __future__ import annotations

import sys

from test_matrix import SUITES as ON_CPU
from test_matrix import command_line, results_of, show

# The newest patch release of the two newest minor ones.
RELEASES = ("0.32.0", "0.33.0")
CONTRACT = (
    "test_admission",
    "test_api_fields",
    "test_chat",
    "test_contract",
    "test_cpu_kernels",
    "test_front_end",
    "test_limits",
    "test_metrics",
    "test_patches",
    "test_remote_code",
    "test_snapshot_stream",
)
SUITES = {
    "contract": [f"tests/vllm/{name}.py" for name in CONTRACT],
    "vllm": ON_CPU["vllm"],
    # But for the one that starts an engine, which finds no device.
    "kernels": [
        *(f"tests/triton/test_{name}.py" for name in ("compiles_for_hopper", "warm_up", "ptx", "warps")),
        "--deselect=tests/triton/test_warm_up.py::test_an_engine_launches_nothing_that_its_start_has_not",
    ],
}
SETTINGS = {"vllm": {"VLLM_TARGET_DEVICE": "cpu"}}


def main() -> int:
    """Command line."""
    args = command_line(__doc__ or "", RELEASES, list(SUITES))
    suites = {suite: SUITES[suite] for suite in args.suites}
    return show(list(results_of(args.releases, "cuda", suites, SETTINGS)), args.markdown)


if __name__ == "__main__":
    sys.exit(main())
