"""A checkpoint that brings code of its own: its configuration and model never run, whatever the operator trusts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from vllm.config import ModelConfig
from vllm.tokenizers.registry import cached_tokenizer_from_config

from vllm_d2cache.models.configs import LLaDAConfig
from vllm_d2cache.models.families import FAMILIES
from vllm_d2cache.registration import register_all

pytestmark = pytest.mark.vllm
TINY = Path(__file__).resolve().parents[2] / "models" / "tiny-llada"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """The tiny checkpoint, with modules that leave a file behind when they are imported."""
    directory = tmp_path / "model"
    shutil.copytree(TINY, directory)
    proof = f"open({str(tmp_path / 'ran')!r}, 'w')\n"
    for module in ("configuration_llada", "modeling_llada", "tokenization_llada"):
        (directory / f"{module}.py").write_text(proof)
    for file, names in {
        "config.json": {
            "AutoConfig": "configuration_llada.LLaDAConfig",
            "AutoModel": "modeling_llada.LLaDAModelLM",
            "AutoModelForCausalLM": "modeling_llada.LLaDAModelLM",
        },
        "tokenizer_config.json": {"AutoTokenizer": ["tokenization_llada.LLaDATokenizer", None]},
    }.items():
        settings = json.loads((directory / file).read_text())
        (directory / file).write_text(json.dumps({**settings, "auto_map": names}))
    return directory


@pytest.mark.parametrize("trusted", [False, True])
def test_configuration_and_model_are_ours(checkpoint: Path, trusted: bool) -> None:
    register_all()
    config = ModelConfig(model=str(checkpoint), trust_remote_code=trusted)
    assert type(config.hf_config) is LLaDAConfig
    assert config.architecture == "LLaDAModelLM"
    module, _, name = FAMILIES["LLaDAModelLM"].model.partition(":")
    cls, _ = config.registry.resolve_model_cls(["LLaDAModelLM"], config)
    assert (cls.__module__, cls.__name__) == (module, name)
    assert not (checkpoint.parent / "ran").exists()


def test_nothing_of_it_runs_for_the_tokenizer_either(checkpoint: Path) -> None:
    """With --trust-remote-code it would: transformers reads tokenizers."""
    register_all()
    assert cached_tokenizer_from_config(ModelConfig(model=str(checkpoint))).encode("abc")
    assert not (checkpoint.parent / "ran").exists()
