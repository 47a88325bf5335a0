"""Block-diffusion checkpoints at start-up: read without remote code, refused with a reason until they can be served."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from vllm.config import ModelConfig

from tests.reference.blocks import BLOCK_ORACLE
from vllm_d2cache.models.families import FAMILIES
from vllm_d2cache.registration import register_all

pytestmark = pytest.mark.vllm

DIRECTORIES = {
    "SDARForCausalLM": "sdar",
    "SDARMoeForCausalLM": "sdar_moe",
    "LLaDA2MoeModelLM": "llada2",
    "Fast_dLLM_QwenForCausalLM": "fast_dllm_v2",
}


def checkpoint(tmp_path: Path, architecture: str, *absent: str, name: str = "model", **changes: Any) -> Path:
    """Its files but for the weights."""
    directory = Path(shutil.copytree(BLOCK_ORACLE / DIRECTORIES[architecture], tmp_path / name))
    (directory / "model.safetensors").unlink()
    config = {**json.loads((directory / "config.json").read_text()), **changes}
    (directory / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k not in absent}))
    return directory


def read(directory: Path, **options: Any) -> ModelConfig:
    register_all()
    return ModelConfig(str(directory), skip_tokenizer_init=True, **options)


@pytest.mark.parametrize("architecture", DIRECTORIES)
def test_start_up_says_why_it_is_not_served(architecture: str) -> None:
    sentence = rf"vllm-d2cache cannot serve {architecture} yet: block-causal attention \(.*\) is not built yet"
    with pytest.raises(ValueError, match=sentence):
        read(BLOCK_ORACLE / DIRECTORIES[architecture])


@pytest.mark.parametrize("architecture", DIRECTORIES)
@pytest.mark.usefixtures("served")
def test_the_file_is_read_without_remote_code(architecture: str, tmp_path: Path) -> None:
    family = FAMILIES[architecture]
    for i, model_type in enumerate((family.model_type, *family.other_types)):
        config = read(checkpoint(tmp_path, architecture, name=str(i), model_type=model_type))
        assert config.trust_remote_code is False
        assert isinstance(config.hf_config, family.config_class())
        assert config.hf_config.model_type == model_type
        assert config.get_head_size() == config.hf_config.shape().head_size


@pytest.mark.usefixtures("served")
def test_stop_ids_without_generation_config(tmp_path: Path) -> None:
    """LLaDA2's published config.json has no end token; the family's own is used."""
    directory = checkpoint(tmp_path, "LLaDA2MoeModelLM", "eos_token_id")
    (directory / "generation_config.json").unlink()
    assert read(directory).try_get_generation_config()["eos_token_id"] == 156892
    sdar = read(BLOCK_ORACLE / "sdar")
    assert sdar.try_get_generation_config()["eos_token_id"] == [372, 371]


def test_llada22_is_refused_by_its_own_reason(tmp_path: Path) -> None:
    directory = checkpoint(tmp_path, "LLaDA2MoeModelLM", expert_capacity=48, block_size=32)
    with pytest.raises(ValueError, match=r"expert_capacity=48: this is LLaDA2\.2.*block routing"):
        read(directory)


@pytest.mark.parametrize("value", [None, "wide"])
def test_a_damaged_file_is_refused_by_its_field(value: Any, tmp_path: Path) -> None:
    directory = checkpoint(tmp_path, "SDARForCausalLM", hidden_size=value)
    with pytest.raises(ValueError, match=rf"config\.json: hidden_size={value!r} \(must be an integer of at least 1\)"):
        read(directory)


@pytest.mark.usefixtures("served")
def test_a_name_with_another_block_length_wants_a_word(tmp_path: Path) -> None:
    directory = checkpoint(tmp_path, "SDARForCausalLM", "block_size", name="SDAR-8B-Chat-b32")
    with pytest.raises(ValueError, match="the checkpoint's name says blocks of 32"):
        read(directory)
    config = read(directory, hf_overrides={"block_size": 32})
    assert config.hf_config.traits().block_length == 32


@pytest.mark.usefixtures("served")
def test_another_mask_token_in_the_tokenizer(tmp_path: Path) -> None:
    directory = checkpoint(tmp_path, "SDARForCausalLM")
    file = {"mask_token": "<|MASK|>", "added_tokens_decoder": {"371": {"content": "<|MASK|>"}}}
    (directory / "tokenizer_config.json").write_text(json.dumps(file))
    with pytest.raises(ValueError, match="mask_token_id=370, but tokenizer_config"):
        read(directory)
    assert read(directory, hf_overrides={"mask_token_id": 371}).hf_config.traits().mask_token_id == 371


@pytest.mark.usefixtures("served")
@pytest.mark.parametrize("by", ["file", "override"])
@pytest.mark.parametrize("architecture", DIRECTORIES)
def test_rope_scaling_is_refused(architecture: str, by: str, tmp_path: Path) -> None:
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
    with pytest.raises(ValueError, match="rope_type='yarn'"):
        if by == "file":
            read(checkpoint(tmp_path, architecture, rope_scaling=scaling))
        else:
            theta = json.loads((BLOCK_ORACLE / DIRECTORIES[architecture] / "config.json").read_text())["rope_theta"]
            read(
                BLOCK_ORACLE / DIRECTORIES[architecture],
                hf_overrides={"rope_scaling": {**scaling, "rope_theta": theta}},
            )
