"""Checkpoints with the published tensor lists and scaled-down widths, loaded by vLLM's own loader; no engine."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.vllm.conftest import numbers

pytestmark = pytest.mark.vllm

Tensors = dict[str, torch.Tensor]
WIDTH, HIDDEN, VOCAB = 64, 96, 128
# Read off docs/methods/d2cache.md, section 9, and nothing else: config.json with the widths scaled down.
CONFIGS: dict[str, dict[str, Any]] = {
    "llada": {
        "architectures": ["LLaDAModelLM"], "model_type": "llada", "d_model": WIDTH, "n_layers": 32, "n_heads": 4,
        "n_kv_heads": 4, "mlp_hidden_size": HIDDEN, "mlp_ratio": 4, "activation_type": "silu", "block_type": "llama",
        "layer_norm_type": "rms", "layer_norm_with_affine": True, "rms_norm_eps": 1e-5, "rope": True,
        "rope_theta": 500000.0, "rope_full_precision": True, "max_sequence_length": 4096, "vocab_size": VOCAB,
        "embedding_size": VOCAB, "weight_tying": False, "include_bias": False, "include_qkv_bias": False,
        "bias_for_layer_norm": False, "attention_layer_norm": False, "input_emb_norm": False, "scale_logits": False,
        "alibi": False, "mask_token_id": 126, "eos_token_id": 127, "pad_token_id": 127, "use_cache": False,
        "precision": "amp_bf16", "init_device": "meta", "torch_dtype": "bfloat16",
        "auto_map": {"AutoConfig": "configuration_llada.LLaDAConfig", "AutoModel": "modeling_llada.LLaDAModelLM"},
    },
    "dream": {
        "architectures": ["DreamModel"], "model_type": "Dream", "hidden_size": WIDTH, "num_hidden_layers": 28,
        "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": HIDDEN, "hidden_act": "silu",
        "rms_norm_eps": 1e-6, "rope_theta": 1e6, "rope_scaling": None, "max_position_embeddings": 131072,
        "vocab_size": VOCAB, "tie_word_embeddings": False, "mask_token_id": 126, "pad_token_id": 127,
        "eos_token_id": 127, "use_sliding_window": False, "torch_dtype": "bfloat16",
        "auto_map": {"AutoConfig": "configuration_dream.DreamConfig", "AutoModel": "modeling_dream.DreamModel"},
    },
    # The mixture of experts: docs/models.md.
    "llada_moe": {
        "architectures": ["LLaDAMoEModelLM"], "model_type": "llada", "hidden_size": WIDTH, "num_hidden_layers": 16,
        "num_attention_heads": 4, "num_key_value_heads": 4, "expert_intermediate_size": HIDDEN, "num_experts": 64,
        "num_experts_per_tok": 8, "moe_layer_freq": [1] * 16, "shared_expert_intermediate_size": None,
        "qk_layernorm": True, "hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 50000,
        "max_position_embeddings": 8192, "vocab_size": VOCAB, "tie_word_embeddings": False, "mask_token_id": 126,
        "pad_token_id": 127, "eos_token_id": 127, "torch_dtype": "bfloat16",
        "auto_map": {"AutoConfig": "configuration_lladamoe.LLaDAConfig"},
    },
}  # fmt: skip
DENSE = ("llada", "dream")
HEADS = {"llada": "model.transformer.ff_out.weight", "dream": "lm_head.weight"}
EMBEDDINGS = {"llada": "model.transformer.wte.weight", "dream": "model.embed_tokens.weight"}
TIES = {"llada": "weight_tying", "dream": "tie_word_embeddings"}


def published(family: str) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor."""
    d, m, v = WIDTH, HIDDEN, VOCAB
    if family == "llada":
        prefix, layers = "model.transformer", 32
        top = {f"{prefix}.wte.weight": (v, d), f"{prefix}.ln_f.weight": (d,), f"{prefix}.ff_out.weight": (v, d)}
        square, wide = ("q_proj", "k_proj", "v_proj", "attn_out"), ("ff_proj", "up_proj")
        layer: dict[str, tuple[int, ...]] = {f"{name}.weight": (d, d) for name in square}
        layer |= {f"{name}.weight": (m, d) for name in wide}
        layer |= {"ff_out.weight": (d, m), "attn_norm.weight": (d,), "ff_norm.weight": (d,)}
        prefix += ".blocks"
    else:
        prefix, layers = "model.layers", CONFIGS[family]["num_hidden_layers"]
        top = {"model.embed_tokens.weight": (v, d), "lm_head.weight": (v, d), "model.norm.weight": (d,)}
        layer = {"input_layernorm.weight": (d,), "post_attention_layernorm.weight": (d,)}
        layer |= {"self_attn.o_proj.weight": (d, d)}
    if family == "dream":
        for name, rows in {"q": d, "k": d // 2, "v": d // 2}.items():
            layer |= {f"self_attn.{name}_proj.weight": (rows, d), f"self_attn.{name}_proj.bias": (rows,)}
        layer |= {f"mlp.{name}_proj.weight": (m, d) for name in ("gate", "up")} | {"mlp.down_proj.weight": (d, m)}
    elif family == "llada_moe":
        layer |= {f"self_attn.{name}_proj.weight": (d, d) for name in "qkv"}
        layer |= {f"self_attn.{name}_norm.weight": (d // 4,) for name in "qk"} | {"mlp.gate.weight": (64, d)}
        for e in range(64):
            layer |= {f"mlp.experts.{e}.{name}_proj.weight": (m, d) for name in ("gate", "up")}
            layer |= {f"mlp.experts.{e}.down_proj.weight": (d, m)}
    return top | {f"{prefix}.{i}.{name}": size for i in range(layers) for name, size in layer.items()}


def write(directory: Path, config: dict[str, Any], tensors: Tensors, shards: int = 3) -> Path:
    """A sharded checkpoint with its index."""
    (directory / "config.json").write_text(json.dumps(config))
    index: dict[str, str] = {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name] for name in sorted(tensors)[i::shards]}
        save_file(part, directory / file, metadata={"format": "pt"})
        index |= dict.fromkeys(part, file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return directory


def random_tensors(family: str) -> Tensors:
    return {name: torch.randn(size).to(torch.bfloat16) for name, size in published(family).items()}


@pytest.mark.parametrize(("family", "count"), [("llada", 291), ("dream", 339), ("llada_moe", 3219)])
def test_published_list_loads_to_the_last_number(family: str, count: int, tmp_path: Path, load: Any) -> None:
    tensors = random_tensors(family)
    assert len(tensors) == count
    loaded = load(write(tmp_path, CONFIGS[family], tensors))
    assert loaded.dtypes == {torch.bfloat16}
    assert torch.equal(loaded.numbers, numbers(list(tensors.values())))


def test_heads_that_are_not_an_even_part_of_the_width(tmp_path: Path, load: Any) -> None:
    """config.json's head_dim decides: q has heads * head_dim rows, the output projection as many columns."""
    tensors = random_tensors("dream")
    for name, tensor in tensors.items():
        if "self_attn.o_proj" in name:
            tensors[name] = tensor.repeat(1, 2)
        elif "self_attn" in name:
            tensors[name] = tensor.repeat(2, *[1] * (tensor.dim() - 1))
    loaded = load(write(tmp_path, {**CONFIGS["dream"], "head_dim": 32}, tensors))
    assert torch.equal(loaded.numbers, numbers(list(tensors.values())))
    attention = loaded.model.layers[0].self_attn
    assert (attention.attn.head_size, attention.rotary_emb.rotary_dim) == (32, 32)


@pytest.mark.parametrize("carries_the_head", [False, True])
@pytest.mark.parametrize("family", DENSE)
def test_tied_head(family: str, carries_the_head: bool, tmp_path: Path, load: Any) -> None:
    tensors = random_tensors(family)
    del tensors[HEADS[family]]
    copy = {HEADS[family]: tensors[EMBEDDINGS[family]].clone()} if carries_the_head else {}
    write(tmp_path, {**CONFIGS[family], TIES[family]: True}, {**tensors, **copy})
    loaded = load(tmp_path)
    assert loaded.model.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(loaded.numbers, numbers(list(tensors.values())))


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("change", ["missing", "unknown", "shape"])
def test_wrong_tensors_are_named(family: str, change: str, tmp_path: Path, load: Any) -> None:
    tensors = random_tensors(family)
    victim = sorted(name for name in tensors if "k_proj" in name)[5]
    if change == "missing":
        del tensors[victim]
    elif change == "unknown":
        victim = victim.replace("k_proj.", "k_norm.")
        tensors[victim] = torch.zeros(4)
    else:
        tensors[victim] = torch.zeros(8, *tensors[victim].shape[1:])
    with pytest.raises(ValueError, match=victim):
        load(write(tmp_path, CONFIGS[family], tensors))


def test_an_untied_checkpoint_needs_its_head(tmp_path: Path, load: Any) -> None:
    tensors = random_tensors("dream")
    del tensors["lm_head.weight"]
    with pytest.raises(ValueError, match=r"lm_head\.weight"):
        load(write(tmp_path, CONFIGS["dream"], tensors))


@pytest.mark.parametrize("family", DENSE)
def test_the_value_projection_does_not_depend_on_how_weights_are_kept(
    family: str, linear_layers: str, tmp_path: Path, load: Any
) -> None:
    """What policies read of a layer's weights: vLLM may have packed them and left the parameter empty."""
    tensors = random_tensors(family)
    loaded = load(write(tmp_path, CONFIGS[family], tensors))
    attention = loaded.model.layers[3].self_attn
    assert (attention.qkv_proj.weight.numel() == 0) == (linear_layers == "packed")
    weight, bias = attention.value_projection(torch.bfloat16)
    (name,) = [name for name in tensors if re.search(r"\.3\.(self_attn\.)?v_proj\.weight", name)]
    assert torch.equal(weight, tensors[name].float())
    assert torch.equal(bias, tensors.get(name.replace("weight", "bias"), torch.zeros(len(weight))).float())
