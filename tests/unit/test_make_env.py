"""tools/make_env.py: which builds of PyTorch an environment may get. No environment is built here."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools import make_env
from tools.make_env import BuildError, check, install_packages, no_cpu_builds, torch_wheels

WHEELS = (
    "torch-2.13.0+cpu-cp311-cp311-manylinux_2_28_x86_64.whl",
    "torch-2.12.0%2Bcpu-cp312-cp312-manylinux_2_28_x86_64.whl",
    "torch-2.13.0+cu130-cp311-cp311-manylinux_2_28_x86_64.whl",
    "torchvision-0.28.0+cpu-cp311-cp311-manylinux_2_28_x86_64.whl",
    "torchvision-0.28.0-cp311-cp311-manylinux_2_28_x86_64.whl",
    "torchmetrics-1.0+cpu-py3-none-any.whl",
)


@pytest.fixture
def links(tmp_path: Path) -> list[str]:
    """Find-links with these wheels, given as a URL, beside two that are none of ours to read."""
    for name in WHEELS:
        (tmp_path / name).touch()
    return [tmp_path.as_uri(), "https://example.org/wheels.html", str(tmp_path / "missing")]


def test_cpu_builds_of_pytorch_are_left_out_by_version(links: list[str]) -> None:
    assert no_cpu_builds(links) == ["torch!=2.12.0+cpu", "torch!=2.13.0+cpu", "torchvision!=0.28.0+cpu"]
    assert no_cpu_builds([]) == []
    assert len(torch_wheels(links)) == 3


@pytest.mark.parametrize(("backend", "constrained"), [("cuda", True), ("cpu", False)])
def test_only_a_cuda_environment_leaves_them_out(
    backend: str, constrained: bool, links: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[str] = []

    def run(command: list[str], *_: object) -> None:
        if "--constraints" in command:
            given.extend(Path(command[command.index("--constraints") + 1]).read_text().split())

    monkeypatch.setattr(make_env, "pip_settings", lambda name: links if name == "find-links" else [])
    monkeypatch.setattr(make_env, "run", run)
    install_packages(tmp_path, backend, ["vllm"], "uv")
    assert given == (no_cpu_builds(links) if constrained else [])


@pytest.mark.parametrize(
    ("backend", "cuda", "works"), [("cuda", "13.0", True), ("cuda", "None", False), ("cpu", "None", True)]
)
def test_a_cuda_environment_without_cuda_is_refused(backend: str, cuda: str, works: bool, tmp_path: Path) -> None:
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text(f"#!/bin/sh\necho 'a warning'\necho {cuda}\necho 'vllm 0.32.0, torch 2.13.0'\n")
    python.chmod(0o755)
    if works:
        assert check(tmp_path, backend) == "vllm 0.32.0, torch 2.13.0"
    else:
        with pytest.raises(BuildError, match=r"(?s)torch 2.13.0: .*without CUDA.*UV_FIND_LINKS"):
            check(tmp_path, backend)
