"""Policies from outside the package: found by entry point, checked when loaded, refused with a reason."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from vllm_d2cache.options import plugins as policy_registry
from vllm_d2cache.options.plugins import BUILT_IN, GROUP, PolicyError, PolicyRegistry, discover
from vllm_d2cache.options.types import Number
from vllm_d2cache.policies import POLICY_CLASSES
from vllm_d2cache.policies.full import FullPolicy

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "policy_plugin"


class Mine(FullPolicy):
    name = "mine"


class BadOption(FullPolicy):
    name = "mine"
    options = {"x": 3}  # noqa: RUF012


class DriftOfHidden(FullPolicy):
    name = "mine"
    reads_drift = hides_keys = True


class DriftOfStored(FullPolicy):
    name = "mine"
    reads_drift = stores_outputs = True


class DropsOfStored(FullPolicy):
    name = "mine"
    drops_rows = stores_outputs = True


class ProxiesOfNothing(FullPolicy):
    name = "mine"
    compares_proxies = True


class Unfinished:
    name = "mine"


def registry(*paths: str) -> PolicyRegistry:
    return PolicyRegistry({"mine": [EntryPoint("mine", path, GROUP) for path in paths]})


def test_a_class_is_loaded_by_its_path() -> None:
    assert registry(f"{__name__}:Mine")["mine"] is Mine


def test_an_unknown_name_is_no_policy() -> None:
    assert "other" not in registry(f"{__name__}:Mine")
    with pytest.raises(KeyError):
        registry(f"{__name__}:Mine")["other"]


@pytest.mark.parametrize(
    ("paths", "reason"),
    [
        (["no_such_module:Mine"], "cannot be loaded: No module named 'no_such_module'"),
        ([f"{__name__}:Nothing"], "cannot be loaded: .*'Nothing'"),
        ([f"{__name__}:Unfinished"], "is not a subclass of vllm_d2cache.policies.CachePolicy"),
        ([f"{__name__}:ROOT"], "is not a subclass"),
        (["vllm_d2cache.policies.full:FullPolicy"], "calls itself 'full'"),
        ([f"{__name__}:BadOption"], "option 'x' that is neither a Number nor a Choice"),
        ([f"{__name__}:DriftOfHidden"], "reads drift and hides keys"),
        ([f"{__name__}:DriftOfStored"], "reads drift and stores outputs"),
        ([f"{__name__}:DropsOfStored"], "drops rows and asks for something else"),
        ([f"{__name__}:ProxiesOfNothing"], "compares proxies and stores no outputs"),
        ([f"{__name__}:Mine", "elsewhere:Mine"], "claimed by .*elsewhere:Mine.*rename or uninstall one"),
    ],
)
def test_what_cannot_be_used_is_refused_with_its_name_and_why(paths: list[str], reason: str) -> None:
    with pytest.raises(PolicyError, match=f"^cache policy 'mine': .*{reason}"):
        registry(*paths)["mine"]


def test_built_in_names_are_not_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = EntryPoint("full", f"{__name__}:Mine", GROUP)
    monkeypatch.setattr(policy_registry, "entry_points", lambda group: [entry])
    with pytest.raises(PolicyError, match=r"'full'.*claimed by"):
        discover()["full"]


def test_a_distribution_found_twice_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = EntryPoint("mine", f"{__name__}:Mine", GROUP)
    monkeypatch.setattr(policy_registry, "entry_points", lambda group: [entry, entry])
    assert discover()["mine"] is Mine


@pytest.mark.parametrize(
    ("option", "spec"), [("window", Number(int, 0)), ("trace_dir", Number(int, 0)), ("cache_steps", Number(int, 1))]
)
def test_option_names_are_unique(option: str, spec: Number, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_d2cache.options import server as config

    monkeypatch.setattr(Mine, "options", {option: spec})
    sources = {name: [EntryPoint(name, path, GROUP)] for name, path in BUILT_IN.items()}
    found = PolicyRegistry({**sources, "mine": [EntryPoint("mine", f"{__name__}:Mine", GROUP)]})
    monkeypatch.setattr(config, "POLICY_CLASSES", found)
    config.option_types.cache_clear()
    try:
        with pytest.raises(PolicyError, match=f"cache policy 'mine': its option '{option}' has a name that is taken"):
            config.parse_server_options({})
    finally:
        config.option_types.cache_clear()


def test_built_in_options_have_defaults_that_are_valid() -> None:
    for cls in POLICY_CLASSES.values():
        for name, spec in cls.options.items():
            if name not in ("selection_sigma", "current_k", "rollout_p", "inflate_w", "confidence_memory"):
                assert spec.parse(spec.default) == spec.default, name


PROGRAM = """
from tests.unit.batches import Batch, FakeJob
from vllm_d2cache.options.types import OptionError
from vllm_d2cache.requests.resolve import parse_server_options

options = {"policy": "periodic", "period": 3, "window": 4}
job, mate = FakeJob([1, 2, 3], 8, options), FakeJob([1] * 9, 20, {"policy": "d2cache", "current_k": 4})
Batch([job, mate]).run([0, 1])
for step in job.steps:
    print(*step.refreshed)
try:
    parse_server_options({"policy": "d2cache", "period": 0})
except OptionError as error:
    print(error)
"""


def install(site: Path) -> None:
    """What pip leaves of the example: its module, and the metadata with its entry points."""
    project = tomllib.loads((EXAMPLE / "pyproject.toml").read_text())["project"]
    metadata = site / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: 0.1.0\n")
    lines = [f"{name} = {value}" for name, value in project["entry-points"][GROUP].items()]
    (metadata / "entry_points.txt").write_text("\n".join([f"[{GROUP}]", *lines]))
    for module in EXAMPLE.glob("*.py"):
        (site / module.name).write_text(module.read_text())


def test_the_example_is_found_and_runs_beside_a_built_in_policy(tmp_path: Path) -> None:
    install(tmp_path)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=environment, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr
    *steps, message = done.stdout.splitlines()
    everything, first, second = "0 1 2 3 4 5 6 7 8 9 10", "3 4 5 6", "7 8 9 10"
    assert steps == [everything, first, first, everything, second, second, everything, second]
    assert '"period"]: must be an integer >= 1 (steps), got 0' in message
