"""config.json of each family: absent and null keys, other spellings, and what the network is built from."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from tests.reference.llada_moe import CONFIG as MOE
from tests.reference.oracle import ORACLE
from vllm_d2cache.canvas.traits import FamilyTraits
from vllm_d2cache.models.configs import DreamConfig, LLaDAConfig, LLaDAMoEConfig
from vllm_d2cache.models.shape import Mixture

DREAM: dict[str, Any] = json.loads((ORACLE / "dream" / "config.json").read_text())


def test_dream_without_keys_is_the_published_one() -> None:
    config = DreamConfig(num_key_value_heads=4)
    shape = config.shape()
    assert (shape.hidden_size, shape.num_layers, shape.head_size, shape.kv_size) == (3584, 28, 128, 512)
    assert (shape.qkv_bias, shape.rope_in_fp32, shape.tied_head) == (True, False, False)
    assert config.traits() == FamilyTraits(
        151666, logit_shift=1, step_schedule="timestep", num_layers=28, family="dream"
    )


@pytest.mark.parametrize("cls", [DreamConfig, LLaDAMoEConfig])
def test_null_kv_heads_are_all_heads(cls: type) -> None:
    shape = cls(num_attention_heads=8, num_key_value_heads=None).shape()
    assert shape.num_kv_heads == 8


def test_rope_in_the_words_of_newer_files() -> None:
    old = DreamConfig.from_dict(DREAM)
    new = {key: value for key, value in DREAM.items() if key not in ("rope_theta", "rope_scaling")}
    entry = {"rope_type": "default", "rope_theta": DREAM["rope_theta"]}
    assert DreamConfig.from_dict({**new, "rope_parameters": entry}).shape() == old.shape()
    other = DreamConfig.from_dict({**DREAM, "rope_scaling": {"type": "dynamic", "factor": 4.0}})
    (reason,) = other.unsupported()
    assert reason.startswith("rope_parameters={'type': 'dynamic', 'factor': 4.0} (supported: rope_type 'default', 'l")


def test_the_architecture_tells_llada_moe_from_llada() -> None:
    config = LLaDAConfig.from_dict(MOE)
    assert type(config) is LLaDAMoEConfig
    assert config.model_type == "lladamoe"
    assert config.unsupported() == []
    shape = config.shape()
    assert shape.mixture == Mixture(num_experts=8, per_token=2, width=32)
    assert (shape.qk_norm, shape.mlp_width) == (True, 64)
    assert type(LLaDAConfig.from_dict({"architectures": ["LLaDAModelLM"]})) is LLaDAConfig
    unnamed = {key: value for key, value in MOE.items() if key != "mask_token_id"} | {"vocab_size": 157184}
    assert LLaDAConfig.from_dict(unnamed).traits() == FamilyTraits(156895, num_layers=3)


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("moe_layer_freq", [1, 0, 1], "layers_without_experts=1"),
        ("moe_layer_freq", [1, 1], "layers_without_experts=1"),
        ("shared_expert_intermediate_size", 512, "shared_expert_intermediate_size=512"),
        ("norm_topk_prob", True, "norm_topk_prob=True"),
        ("qk_layernorm", False, "qk_layernorm=False"),
        ("router_num_group", 8, "router_num_group=8"),
        ("partial_rotary_factor", 0.5, "partial_rotary_factor=0.5"),
    ],
)
def test_other_mixtures_are_refused(key: str, value: Any, named: str) -> None:
    (reason,) = LLaDAConfig.from_dict({**MOE, key: value}).unsupported()
    assert reason.startswith(named)


def test_heads_of_any_size() -> None:
    shape = DreamConfig.from_dict({**DREAM, "head_dim": 32}).shape()
    assert (shape.hidden_size, shape.num_heads, shape.head_size) == (64, 4, 32)
    assert (shape.q_size, shape.kv_size) == (128, 64)
    assert DreamConfig.from_dict({**DREAM, "head_dim": None}).shape().head_size == 16


def test_layers_of_two_kinds() -> None:
    mixture = Mixture(num_experts=16, per_token=4, width=48, shared_width=32)
    shape = replace(DreamConfig().shape(), num_layers=3, intermediate_size=160, mixture=mixture, dense_layers=1)
    assert [shape.mixture_of(i) for i in range(3)] == [None, mixture, mixture]
    assert shape.mlp_width == 4 * 48 + 32
    assert replace(shape, dense_layers=3).mlp_width == 160
    assert replace(shape, intermediate_size=500).mlp_width == 500
