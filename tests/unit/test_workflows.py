""".github: workflows call targets that the Makefile has, on the releases and Pythons that the package supports."""

from __future__ import annotations

import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tools.make_env import PYTHONS
from tools.test_matrix import RELEASES

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = {path.stem: yaml.safe_load(path.read_text()) for path in sorted((ROOT / ".github/workflows").glob("*.yml"))}
ACTION = yaml.safe_load((ROOT / ".github/actions/env/action.yml").read_text())
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
PYTHON_NAMES = [f"3.{minor}" for minor in range(PYTHONS[0][1], PYTHONS[1][1] + 1)]


def steps(workflow: str) -> Iterator[dict[str, Any]]:
    for job in WORKFLOWS[workflow]["jobs"].values():
        yield from job["steps"]


def made(workflow: str) -> list[str]:
    """Targets that its steps make; those of a matrix written out."""
    found = []
    for job in WORKFLOWS[workflow]["jobs"].values():
        for line in (line for step in job["steps"] for line in str(step.get("run", "")).splitlines()):
            words = shlex.split(line)
            if words[:1] == ["make"]:
                found += job["strategy"]["matrix"]["suite"] if words[1] == "$SUITE" else [words[1]]
    return found


@pytest.mark.parametrize("name", WORKFLOWS)
def test_targets_exist(name: str) -> None:
    assert set(made(name)) <= TARGETS


@pytest.mark.parametrize("name", WORKFLOWS)
def test_jobs_end_and_may_only_read(name: str) -> None:
    workflow = WORKFLOWS[name]
    assert workflow["permissions"] == {"contents": "read"}
    assert all("timeout-minutes" in job for job in workflow["jobs"].values())
    writing = {job for job, content in workflow["jobs"].items() if "permissions" in content}
    assert writing == ({"test-pypi", "pypi", "github"} if name == "release" else set())


def test_a_change_is_tested_by_all_of_make_test() -> None:
    tests = re.search(r"^test: ([^#]*)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert tests is not None
    assert set(made("lint") + made("cpu")) == {*tests[1].split(), "docs", "dist"}


def test_the_matrix_is_the_window_on_every_python() -> None:
    for name, job in WORKFLOWS["cpu"]["jobs"].items():
        assert job["strategy"]["fail-fast"] is False
        assert job["strategy"]["matrix"] == {"python": PYTHON_NAMES, "vllm": list(RELEASES)}, name


def test_pythons_are_those_of_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    low, high = re.findall(r"3\.(\d+)", project["requires-python"])
    assert [f"3.{minor}" for minor in range(int(low), int(high))] == PYTHON_NAMES


def test_gpu_tests_wait_for_the_label() -> None:
    (job,) = WORKFLOWS["gpu"]["jobs"].values()
    assert "gpu" in job["runs-on"]
    assert job["if"] == "github.event_name == 'workflow_dispatch' || github.event.label.name == 'gpu'"
    # YAML 1.1 reads the key `on` as true.
    assert WORKFLOWS["gpu"][True] == {"pull_request": {"types": ["labeled"]}, "workflow_dispatch": None}


def test_the_window_opens_where_the_nightly_run_opens_it() -> None:
    """Its sed commands find what they look for."""
    script = next(step["run"] for step in steps("nightly") if "sed" in str(step.get("run")))
    for line in re.findall(r"sed -i -E .*", script):
        *_, command, path = shlex.split(line)
        _, pattern, replacement, _ = command.split("/")
        opened, changes = re.subn(pattern, replacement, (ROOT / path).read_text(), flags=re.MULTILINE)
        assert changes == (2 if path == "pyproject.toml" else 1), line
        if path == "pyproject.toml":
            extras = tomllib.loads(opened)["project"]["optional-dependencies"]
            assert not [word for extra in ("cuda", "cpu") for word in extras[extra] if "<" in word]


def test_inputs_of_the_action_are_given_by_name() -> None:
    for name in WORKFLOWS:
        for step in steps(name):
            if step.get("uses") == "./.github/actions/env":
                assert set(step.get("with", {})) <= set(ACTION["inputs"]), name
