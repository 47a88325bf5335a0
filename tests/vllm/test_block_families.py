"""Block-diffusion checkpoints at start-up: read without remote code, with their families' defaults."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from vllm.config import ModelConfig, VllmConfig
from vllm.engine.arg_utils import EngineArgs

from tests.reference.blocks import BLOCK_ORACLE
from vllm_d2cache.models.families import FAMILIES
from vllm_d2cache.registration import register_all
from vllm_d2cache.requests.resolve import parse_server_options, resolve

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


def test_start_up_says_why_a_family_is_not_served(monkeypatch: pytest.MonkeyPatch) -> None:
    families = {**FAMILIES, "SDARForCausalLM": replace(FAMILIES["SDARForCausalLM"], unserved="a reason")}
    monkeypatch.setattr("vllm_d2cache.models.config_rules.FAMILIES", families)
    with pytest.raises(ValueError, match="vllm-d2cache cannot serve SDARForCausalLM yet: a reason"):
        read(BLOCK_ORACLE / "sdar")


DEFAULTS = {
    "SDARForCausalLM": {"policy": "block", "threshold": 0.85, "block_length": 4},
    "SDARMoeForCausalLM": {"policy": "block", "threshold": 0.85, "block_length": 4},
    "LLaDA2MoeModelLM": {"policy": "block", "threshold": 0.95, "block_length": 32},
    "Fast_dLLM_QwenForCausalLM": {"policy": "block", "threshold": 0.9, "window": 8, "block_length": 8},
}


def configured(architecture: str, **settings: Any) -> VllmConfig:
    register_all()
    args = EngineArgs(str(BLOCK_ORACLE / DIRECTORIES[architecture]), skip_tokenizer_init=True, **settings)
    return args.create_engine_config()


@pytest.mark.parametrize("architecture", DIRECTORIES)
def test_a_family_brings_its_own_defaults_and_the_operator_wins(architecture: str) -> None:
    defaults = DEFAULTS[architecture]
    plain = configured(architecture)
    piece = {"prefill_piece": plain.scheduler_config.max_num_batched_tokens // 4}
    assert plain.additional_config["d2cache"] == {**defaults, **piece}
    own = configured(architecture, additional_config={"d2cache": {"threshold": 0.5}}).additional_config["d2cache"]
    assert own == {**defaults, **piece, "threshold": 0.5}
    options = resolve(parse_server_options(own), {})
    assert (options.policy, options.threshold, options.sigma) == ("block", 0.5, 0.0)
    assert options.block == defaults["block_length"]


def test_the_longest_request_has_whole_blocks() -> None:
    assert configured("SDARForCausalLM", max_model_len=203).model_config.max_model_len == 200
    with pytest.raises(ValueError, match="--max-model-len 3: must be at least 4, one block"):
        configured("SDARForCausalLM", max_model_len=3)


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"block_length": 8}, r"\[\"block_length\"\]: is set by the plugin \(4 with this model\)"),
        ({"policy": "dkv"}, "d2cache_policy: must be 'd2cache' or 'full' or 'block' with this model"),
        ({"window": 3}, "d2cache_window: must be 0 or divide 4, the block length of this model"),
    ],
)
def test_what_has_no_meaning_with_blocks_is_refused_at_start_up(section: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        configured("SDARForCausalLM", additional_config={"d2cache": section})


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
    directory = checkpoint(tmp_path, "LLaDA2MoeModelLM", "eos_token_id", vocab_size=157184)
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
    with pytest.raises(
        ValueError, match=rf"hidden_size={value!r} \((must be|config\.json must name it:) a whole number"
    ):
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
    file = {"mask_token": "<|MASK|>", "added_tokens_decoder": {"369": {"content": "<|MASK|>"}}}
    (directory / "tokenizer_config.json").write_text(json.dumps(file))
    with pytest.raises(ValueError, match="mask_token_id=370, but tokenizer_config"):
        read(directory)
    assert read(directory, hf_overrides={"mask_token_id": 369}).hf_config.traits().mask_token_id == 369


@pytest.mark.usefixtures("served")
@pytest.mark.parametrize("by", ["file", "override"])
@pytest.mark.parametrize("architecture", DIRECTORIES)
def test_rope_scaling_is_refused(architecture: str, by: str, tmp_path: Path) -> None:
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
    with pytest.raises(ValueError, match=r"rope_parameters=\{'rope_type': 'yarn'"):
        if by == "file":
            read(checkpoint(tmp_path, architecture, rope_scaling=scaling))
        else:
            theta = json.loads((BLOCK_ORACLE / DIRECTORIES[architecture] / "config.json").read_text())["rope_theta"]
            read(
                BLOCK_ORACLE / DIRECTORIES[architecture],
                hf_overrides={"rope_scaling": {**scaling, "rope_theta": theta}},
            )
