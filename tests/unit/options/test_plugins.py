"""Policies from outside the package: found by entry point, checked when loaded, refused with a reason."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest

from vllm_d2cache.decoders import Commits, Decoder, DecoderStep
from vllm_d2cache.decoders.registry import DECODER_CLASSES
from vllm_d2cache.mechanisms import KEYS, Use
from vllm_d2cache.mechanisms.drift import ReadsDrift
from vllm_d2cache.mechanisms.hidden_keys import HidesKeys
from vllm_d2cache.mechanisms.importance import ReadsImportance
from vllm_d2cache.mechanisms.row_exits import DropsRows
from vllm_d2cache.mechanisms.stored_outputs import StoresOutputs
from vllm_d2cache.options import plugins
from vllm_d2cache.options.plugins import PluginError, Plugins, discover
from vllm_d2cache.options.types import Number
from vllm_d2cache.policies import POLICY_CLASSES
from vllm_d2cache.policies.full import FullPolicy
from vllm_d2cache.policies.registry import BUILT_IN, GROUP
from vllm_d2cache.requests import resolve

ROOT = Path(__file__).resolve().parents[3]
EXAMPLES = {
    "policy_plugin": ("vllm_d2cache.policies", ("periodic", "key_norm")),
    "decoder_plugin": ("vllm_d2cache.decoders", ("leftmost",)),
}


class Mine(FullPolicy):
    name = "mine"


class BadOption(FullPolicy):
    name = "mine"
    options = {"x": 3}  # noqa: RUF012


class BadDefault(FullPolicy):
    name = "mine"
    options = {"x": Number(int, 1)}  # noqa: RUF012


class DriftOfHidden(FullPolicy):
    name = "mine"
    uses = (ReadsDrift(), HidesKeys())


class DriftOfStored(FullPolicy):
    name = "mine"
    uses = (StoresOutputs(), ReadsDrift())


class DropsOfStored(FullPolicy):
    name = "mine"
    uses = (DropsRows(layers=1), StoresOutputs())


class ImportanceOfStored(FullPolicy):
    """Its rollout would be made of maps that some layers leave out."""

    name = "mine"
    uses = (ReadsImportance(), StoresOutputs())


class ImportanceOfHidden(FullPolicy):
    name = "mine"
    uses = (HidesKeys(), ReadsImportance())


class Unfinished:
    name = "mine"


class Mute(Decoder):
    name = "mute"

    def choose(self, step: DecoderStep) -> Commits:
        return Commits(step.candidates)


def registry(*paths: str) -> Plugins[Any]:
    sources = {"mine": [EntryPoint("mine", path, GROUP) for path in paths]}
    return Plugins("cache policy", sources, POLICY_CLASSES._problem)


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
        ([f"{__name__}:BadDefault"], "option 'x' whose default None is not an integer >= 1"),
        ([f"{__name__}:DriftOfHidden"], "reads drift and hides keys: the one needs keys, which the other takes"),
        ([f"{__name__}:DriftOfStored"], "reads drift and stores outputs: the one needs rows, which the other takes"),
        ([f"{__name__}:DropsOfStored"], "drops rows and stores outputs: the one needs rows"),
        ([f"{__name__}:ImportanceOfStored"], "attention importance and stores outputs: the one needs rows"),
        ([f"{__name__}:ImportanceOfHidden"], "attention importance and hides keys: the one needs keys"),
        ([f"{__name__}:Mine", "elsewhere:Mine"], "claimed by .*elsewhere:Mine.*rename or uninstall one"),
    ],
)
def test_what_cannot_be_used_is_refused_with_its_name_and_why(paths: list[str], reason: str) -> None:
    with pytest.raises(PluginError, match=f"^cache policy 'mine': .*{reason}"):
        registry(*paths)["mine"]


def test_built_in_names_are_not_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = EntryPoint("full", f"{__name__}:Mine", GROUP)
    monkeypatch.setattr(plugins, "entry_points", lambda group: [entry])
    with pytest.raises(PluginError, match=r"'full'.*claimed by"):
        Plugins("cache policy", discover(GROUP, BUILT_IN), POLICY_CLASSES._problem)["full"]


def test_a_distribution_found_twice_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = EntryPoint("mine", f"{__name__}:Mine", GROUP)
    monkeypatch.setattr(plugins, "entry_points", lambda group: [entry, entry])
    assert Plugins("cache policy", discover(GROUP, BUILT_IN), POLICY_CLASSES._problem)["mine"] is Mine


def test_decoders_are_found_the_same_way(monkeypatch: pytest.MonkeyPatch) -> None:
    group = "vllm_d2cache.decoders"
    monkeypatch.setattr(plugins, "entry_points", lambda group: [EntryPoint("mute", f"{__name__}:Mute", group)])
    assert Plugins("decoder", discover(group, {}), DECODER_CLASSES._problem)["mute"] is Mute
    monkeypatch.setattr(plugins, "entry_points", lambda group: [EntryPoint("mute", f"{__name__}:Mine", group)])
    with pytest.raises(PluginError, match=r"decoder 'mute': .* is not a subclass of vllm_d2cache.decoders.Decoder"):
        Plugins("decoder", discover(group, {}), DECODER_CLASSES._problem)["mute"]


def test_what_a_mechanism_takes_from_itself_is_no_conflict() -> None:
    class Both(HidesKeys):
        needs = frozenset({KEYS})

    class Policy(FullPolicy):
        name = "mine"
        uses: tuple[Use, ...] = (Both(),)

    assert POLICY_CLASSES._problem(Policy) is None


@pytest.mark.parametrize("option", ["window", "trace_dir", "cache_steps", "gamma"])
def test_option_names_are_unique(option: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Mine, "options", {option: Number(int, 0, default=0)})
    sources = {name: [EntryPoint(name, path, GROUP)] for name, path in BUILT_IN.items()}
    sources["mine"] = [EntryPoint("mine", f"{__name__}:Mine", GROUP)]
    found = Plugins("cache policy", sources, POLICY_CLASSES._problem)
    monkeypatch.setattr(resolve, "POLICY_CLASSES", found)
    resolve.option_types.cache_clear()
    try:
        with pytest.raises(PluginError, match=f"its option '{option}' has a name that is taken"):
            resolve.parse_server_options({})
    finally:
        resolve.option_types.cache_clear()


@pytest.mark.parametrize("cls", [*POLICY_CLASSES.values(), *DECODER_CLASSES.values()], ids=lambda cls: cls.name)
def test_built_in_options_have_defaults_that_are_valid(cls: Any) -> None:
    for name, spec in cls.options.items():
        assert spec.parse(spec.default) == spec.default, name


PROGRAM = """
from tests.unit.batches import Batch, FakeJob
from vllm_d2cache.options.types import OptionError
from vllm_d2cache.requests.resolve import parse_server_options

options = {"policy": "periodic", "period": 3, "window": 4}
job, mate = FakeJob([1, 2, 3], 8, options), FakeJob([1] * 9, 20, {"policy": "d2cache", "current_k": 4})
left = FakeJob([1] * 5, 9, {"decoder": "leftmost", "run": 4}, noise=2)
Batch([job, mate, left]).run([0, 1, 1])
for step in job.steps:
    print(*step.refreshed)
print([[slot for slot, _ in step.committed] for step in left.steps])
for bad in ({"policy": "periodic", "period": 0}, {"decoder": "leftmost", "run": "x"}):
    try:
        parse_server_options(bad)
    except OptionError as error:
        print(error)
"""


def install(site: Path, example: str) -> None:
    """What pip leaves of an example: its modules, and the metadata with its entry points."""
    directory = ROOT / "examples" / example
    project = tomllib.loads((directory / "pyproject.toml").read_text())["project"]
    metadata = site / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: 0.1.0\n")
    group, names = EXAMPLES[example]
    entries = project["entry-points"][group]
    assert set(entries) == set(names)
    (metadata / "entry_points.txt").write_text("\n".join([f"[{group}]", *(f"{n} = {v}" for n, v in entries.items())]))
    for module in directory.glob("*.py"):
        (site / module.name).write_text(module.read_text())


def test_the_examples_are_found_and_run_beside_built_in_ones(tmp_path: Path) -> None:
    """A policy and a decoder from outside touch no file of the package."""
    for example in EXAMPLES:
        install(tmp_path, example)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=environment, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr
    *steps, left, of_policy, of_decoder = done.stdout.splitlines()
    everything, first, second = "0 1 2 3 4 5 6 7 8 9 10", "3 4 5 6", "7 8 9 10"
    assert steps == [everything, first, first, everything, second, second, everything, second]
    assert left == "[[0, 1, 2, 3], [4, 5, 6, 7], [8]]"
    assert '"period"]: must be an integer >= 1 (steps), got 0' in of_policy
    assert '"run"]: must be an integer >= 1 (tokens), got' in of_decoder
