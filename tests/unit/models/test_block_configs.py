"""config.json of the block-diffusion families: what the network is built from, and every refusal by its field."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from tests.reference.blocks import BLOCK_ORACLE
from vllm_d2cache.canvas.traits import FamilyTraits
from vllm_d2cache.models.block_configs import (
    BlockDiffusionConfig,
    FastDLLMv2Config,
    LLaDA2Config,
    SDARConfig,
    SDARMoeConfig,
)
from vllm_d2cache.models.config_rules import mask_contradiction
from vllm_d2cache.models.families import FAMILIES
from vllm_d2cache.models.shape import Mixture

CLASSES = {"sdar": SDARConfig, "sdar_moe": SDARMoeConfig, "llada2": LLaDA2Config, "fast_dllm_v2": FastDLLMv2Config}
FILES: dict[str, dict[str, Any]] = {
    family: json.loads((BLOCK_ORACLE / family / "config.json").read_text()) for family in CLASSES
}


def read(family: str, *absent: str, **changes: Any) -> BlockDiffusionConfig:
    raw = {key: value for key, value in FILES[family].items() if key not in absent}
    return CLASSES[family].from_dict({**raw, **changes})


def test_sdar_is_built_as_published() -> None:
    """4B: 2560 wide, 32 heads of 128; neither block_size nor mask_token_id in the file."""
    sizes = {"hidden_size": 2560, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128}
    config = read("sdar", "block_size", "mask_token_id", vocab_size=151936, **sizes)
    shape = config.shape()
    assert (shape.q_size, shape.kv_size, shape.head_size) == (4096, 1024, 128)
    assert (shape.qk_norm, shape.qkv_bias, shape.rotary_dim, shape.mixture) == (True, False, None, None)
    assert config.traits() == FamilyTraits(151669, 0, "window", 4, "sdar", block_length=4)
    assert config.unsupported() == []


def test_texts_are_decoded_as_the_family_does() -> None:
    """Fast-dLLM v2 in sub-blocks of 8, where its block has whole ones."""
    assert read("sdar").decoding_defaults() == read("sdar_moe").decoding_defaults()
    assert read("sdar").decoding_defaults() == {"policy": "block", "threshold": 0.85}
    assert read("llada2").decoding_defaults() == {"policy": "block", "threshold": 0.95}
    windows = [read("fast_dllm_v2", bd_size=size).decoding_defaults() for size in (32, 8, 4)]
    assert windows == [{"policy": "block", "threshold": 0.9, "window": window} for window in (8, 8, 0)]


def test_sdar_moe_is_built_as_published() -> None:
    config = read("sdar_moe")
    assert config.shape().mixture == Mixture(8, 3, 24, renormalised=True)
    assert config.shape().qk_norm
    assert config.traits() == FamilyTraits(370, 0, "window", 3, "sdar_moe", block_length=4)


def test_llada2_is_built_as_published() -> None:
    """mini; the file names neither mask token nor block length, and leaves out use_qk_norm."""
    config = LLaDA2Config()
    shape = config.shape()
    assert (shape.hidden_size, shape.num_layers, shape.head_size, shape.rotary_dim) == (2048, 20, 128, 64)
    assert (shape.dense_layers, shape.intermediate_size, shape.qk_norm) == (1, 5120, True)
    assert shape.mixture == Mixture(
        256, 8, 512, scoring="sigmoid", renormalised=True, scale=2.5, bias=True, groups=8, groups_kept=4,
        shared_width=512, router_in_fp32=True,
    )  # fmt: skip
    assert shape.mlp_width == 5120
    assert config.traits() == FamilyTraits(156895, 0, "window", 20, "llada2_moe", block_length=32)
    assert config.unsupported() == []
    assert read("llada2", "partial_rotary_factor").shape().rotary_dim == 8
    assert read("llada2", "rotary_dim").shape().rotary_dim == 8


def test_fast_dllm_v2_is_built_as_published() -> None:
    config = FastDLLMv2Config()
    assert (config.shape().qkv_bias, config.shape().qk_norm, config.shape().head_size) == (True, False, 128)
    assert config.traits() == FamilyTraits(151665, 1, "window", 28, "Fast_dLLM_Qwen", block_length=32)
    assert read("fast_dllm_v2").traits() == FamilyTraits(370, 1, "window", 4, "Fast_dLLM_Qwen", block_length=8)
    assert read("fast_dllm_v2", tie_word_embeddings=True).shape().tied_head


@pytest.mark.parametrize("family", CLASSES)
def test_the_oracles_files_are_supported(family: str) -> None:
    assert read(family).unsupported() == []
    assert FILES[family]["architectures"][0] in FAMILIES


@pytest.mark.parametrize("family", CLASSES)
@pytest.mark.parametrize("value", [None, "12", -1, 2.5, True, [1]])
def test_a_size_that_is_none_is_refused_by_name(family: str, value: Any) -> None:
    for key in CLASSES[family].required:
        if key == "rope_theta" and value == 2.5:
            continue
        (reason,) = read(family, **{key: value}).unsupported()
        assert reason.startswith(f"{key}={value!r} (") and re.search(r"a whole number from 1|a number from ", reason)


@pytest.mark.parametrize("family", CLASSES)
def test_what_differs_between_checkpoints_must_be_there(family: str) -> None:
    for key in CLASSES[family].required:
        (reason,) = read(family, key).unsupported()
        assert reason.startswith(f"{key}=None (config.json must name it: a ")
    reasons = read(family, "hidden_size", "vocab_size").unsupported()
    assert [reason.partition("=")[0] for reason in reasons] == ["vocab_size", "hidden_size"]


COUNT, NAMED = "a whole number from 1 to 2147483647", "config.json must name it: "
WRONG: list[tuple[str, str, Any, str]] = [
    ("sdar", "head_dim", None, NAMED + COUNT),
    ("sdar", "rms_norm_eps", 0, "must be a number above 0 and below 1"),
    ("sdar", "rms_norm_eps", None, NAMED + "a number above 0 and below 1"),
    ("sdar", "rope_theta", "1e6", "must be a number from 1 to 1e+30"),
    ("sdar", "tie_word_embeddings", None, NAMED + "true or false"),
    ("sdar", "mask_token_id", -3, "not in the vocabulary: must be an id from 0 to 383"),
    ("sdar", "mask_token_id", None, "config.json must name it: an id from 0 to 383"),
    ("sdar", "block_size", 0, "must be " + COUNT),
    ("sdar_moe", "num_experts", None, NAMED + COUNT),
    ("sdar_moe", "moe_intermediate_size", 0, "must be " + COUNT),
    ("llada2", "routed_scaling_factor", None, NAMED + "a number from 0.001 to 1000"),
    ("llada2", "partial_rotary_factor", 1.5, "must be a number above 0 and at most 1"),
    ("llada2", "first_k_dense_replace", -1, "must be a whole number from 0 to 2147483647"),
    ("llada2", "n_group", None, NAMED + COUNT),
    ("fast_dllm_v2", "bd_size", "32", "must be " + COUNT),
]


@pytest.mark.parametrize(("family", "key", "value", "valid"), WRONG)
def test_a_wrong_value_is_refused_by_name(family: str, key: str, value: Any, valid: str) -> None:
    assert read(family, **{key: value}).unsupported() == [f"{key}={value!r} ({valid})"]
    # An override on the command line comes after the file has been read.
    config = read(family)
    config.update({key: value})
    with pytest.raises(ValueError) as caught:
        config.check()
    assert f"{key}={value!r} ({valid})" in str(caught.value)


UNSUPPORTED: list[tuple[str, dict[str, Any], str]] = [
    (
        "sdar",
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
        "rope_parameters={'rope_type': 'yarn', 'factor': 4.0}",
    ),
    ("sdar", {"rope_scaling": {"type": "linear", "factor": 4.0}}, "rope_parameters={'type': 'linear', 'factor': 4.0}"),
    ("sdar", {"rope_scaling": "yarn"}, "rope_parameters='yarn'"),
    ("sdar", {"attention_bias": True}, "attention_bias=True"),
    ("sdar", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
    ("sdar", {"use_sliding_window": True}, "use_sliding_window=True"),
    ("sdar", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
    ("sdar", {"mask_token_id": 384}, "mask_token_id=384 (not in the vocabulary"),
    ("sdar", {"num_key_value_heads": 3}, "3 heads of keys and values do not divide 4 attention heads"),
    ("sdar", {"head_dim": 31}, "heads of 31 elements (RoPE rotates pairs"),
    ("sdar", {"block_length": 8}, "block_size=4 but block_length=8 (must agree)"),
    ("sdar_moe", {"norm_topk_prob": False}, "norm_topk_prob=False"),
    ("sdar_moe", {"mlp_only_layers": [0]}, "mlp_only_layers=[0]"),
    ("sdar_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step=2"),
    ("sdar_moe", {"num_experts_per_tok": 9}, "9 experts a token of 8"),
    ("llada2", {"score_function": "softmax"}, "score_function='softmax'"),
    ("llada2", {"moe_router_enable_expert_bias": False}, "moe_router_enable_expert_bias=False"),
    ("llada2", {"use_qk_norm": False}, "use_qk_norm=False"),
    ("llada2", {"use_qkv_bias": True}, "use_qkv_bias=True"),
    ("llada2", {"router_dtype": "bf16"}, "router_dtype='bf16'"),
    ("llada2", {"rotary_dim": 16}, "rotary_dim=16 but partial_rotary_factor=0.5 (must agree)"),
    ("llada2", {"n_group": 3}, "n_group=3 (must divide num_experts=16 into groups of 2 or more)"),
    ("llada2", {"n_group": 16}, "n_group=16 (must divide num_experts=16 into groups of 2 or more)"),
    ("llada2", {"topk_group": 5}, "topk_group=5 (at most n_group=4)"),
    ("llada2", {"num_experts_per_tok": 9}, "num_experts_per_tok=9 (at most the 8 experts of topk_group groups)"),
    ("llada2", {"expert_capacity": 48}, "expert_capacity=48: this is LLaDA2.2, whose experts are first chosen for"),
    (
        "fast_dllm_v2",
        {"layer_types": ["full_attention", "sliding_attention"]},
        "layer_types=['full_attention', 'sliding_att",
    ),
]


@pytest.mark.parametrize(("family", "changes", "reason"), UNSUPPORTED)
def test_what_the_network_does_not_compute_is_refused(family: str, changes: dict[str, Any], reason: str) -> None:
    (found,) = read(family, **changes).unsupported()
    assert found.startswith(reason)


def test_theta_in_the_words_of_newer_files() -> None:
    entry = {"rope_type": "default", "rope_theta": 600000, "partial_rotary_factor": 0.5}
    keys = ("rope_theta", "rope_scaling", "partial_rotary_factor", "rotary_dim")
    config = read("llada2", *keys, rope_parameters=entry)
    assert config.shape() == read("llada2").shape()
    (reason,) = read("llada2", *keys, rope_parameters={"rope_type": "default"}).unsupported()
    assert reason.startswith("rope_theta=None (config.json must name it")


def test_rope_changed_on_the_command_line() -> None:
    """Overrides come after the file has been read: they must not be ignored."""
    config = read("sdar")
    config.update({"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1000000}})
    with pytest.raises(ValueError, match=r"rope_parameters=\{'rope_type': 'yarn'"):
        config.check()
    config = read("sdar")
    config.update({"rope_parameters": {"rope_type": "default", "rope_theta": 5.0}})
    config.check()
    assert config.shape().rope_theta == 5.0


def test_an_absent_mask_and_a_null_block_length_are_the_familys() -> None:
    """In the family's own vocabulary; null is a mask token that has been lost."""
    traits = read("sdar", "mask_token_id", block_size=None, vocab_size=151936).traits()
    assert (traits.mask_token_id, traits.block_length) == (151669, 4)
    for vocabulary in (151936, 152064):
        assert read("fast_dllm_v2", "mask_token_id", vocab_size=vocabulary).traits().mask_token_id == 151665
    assert read("llada2", block_size=16).traits().block_length == 16


def test_a_name_that_says_another_block_length() -> None:
    """Published SDAR files do not tell -b32 from -b4: nothing may be guessed there."""
    config = read("sdar", "block_size")
    for name in ("org/SDAR-8B-Chat-b32", "/models/SDAR-8B-Chat-b32/"):
        config.name_or_path = name
        (reason,) = config.unsupported()
        assert "blocks of 32" in reason and "--hf-overrides '{\"block_size\": 32}'" in reason
    config.block_size = 32
    assert config.unsupported() == []
    assert config.traits().block_length == 32
    unnamed = read("sdar", "block_size")
    for name in ("org/SDAR-8B-Chat", "org/SDAR-8B-Chat-b4", "/models/a-b32/snapshot"):
        unnamed.name_or_path = name
        assert unnamed.unsupported() == []


@pytest.mark.parametrize("kind", [str, dict])
def test_a_tokenizer_with_another_mask_token(kind: type) -> None:
    token: Any = "<|MASK|>" if kind is str else {"content": "<|MASK|>", "special": True}
    entries = {"151643": {"content": "<|endoftext|>"}, "151669": {"content": "<|MASK|>"}}
    tokenizer = {"mask_token": token, "added_tokens_decoder": entries}
    assert mask_contradiction(tokenizer, 151669) is None
    reason = mask_contradiction(tokenizer, 151665)
    assert reason is not None
    assert reason.startswith(
        "mask_token_id=151665, but tokenizer_config.json's mask_token '<|MASK|>' has the id 151669"
    )
    # Where it cannot be seen.
    for unclear in ({}, {"mask_token": None}, {**tokenizer, "added_tokens_decoder": {}}, {"mask_token": token}):
        assert mask_contradiction(unclear, 5) is None
