"""The diffs of patches/ fit the releases they are for."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import vllm

from tools.test_matrix import RELEASES

pytestmark = pytest.mark.vllm

PATCHES = Path(__file__).resolve().parents[2] / "patches"


def diffs(release: str) -> list[Path]:
    minor = ".".join(release.split(".")[:2])
    return sorted((PATCHES / f"vllm-{minor}").glob("*.patch"))


def test_every_release_of_the_window_has_the_same_diffs() -> None:
    # 0.33 has no build for CPUs yet.
    names = [[path.name for path in diffs(release)] for release in (*RELEASES, "0.33.0")]
    assert names[0]
    assert all(own == names[0] for own in names)


def test_the_diffs_apply_to_the_installed_vllm() -> None:
    if shutil.which("patch") is None:
        pytest.skip("no patch(1) on this machine")
    found = diffs(vllm.__version__)
    assert found, f"no diffs for vLLM {vllm.__version__}"
    for path in found:
        done = subprocess.run(
            ["patch", "-p1", "--dry-run", "--fuzz=0"],
            cwd=Path(vllm.__file__).parents[1],
            input=path.read_bytes(),
            capture_output=True,
        )
        assert done.returncode == 0, f"{path.name}: {done.stdout.decode()}"
