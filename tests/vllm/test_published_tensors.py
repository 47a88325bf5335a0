"""Checkpoints with the published tensor lists and scaled-down widths, loaded by vLLM's own loader; no engine."""

from __future__ import annotations

import json
import re
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.vllm.conftest import numbers
from vllm_d2cache.models.families import FAMILIES

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
    # The block-diffusion families: docs/models.md. Layers, experts and keys as published, widths scaled down.
    "sdar": {
        "architectures": ["SDARForCausalLM"], "model_type": "sdar", "hidden_size": WIDTH, "num_hidden_layers": 36,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "intermediate_size": HIDDEN,
        "hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 1000000, "rope_scaling": None,
        "max_position_embeddings": 32768, "max_window_layers": 36, "sliding_window": None, "use_sliding_window": False,
        "vocab_size": VOCAB, "tie_word_embeddings": False, "attention_bias": False, "attention_dropout": 0.0,
        "mask_token_id": 126, "bos_token_id": 127, "eos_token_id": 127, "torch_dtype": "bfloat16",
        "attn_implementation": "flex_attention", "fuse_cross_entropy": True, "debug": False, "ep_size": 1,
        "micro_forward": False, "skip_checkpoint": False, "use_deepep": False,
        "auto_map": {"AutoConfig": "configuration_sdar.SDARConfig"},
    },
    "sdar_moe": {
        "architectures": ["SDARMoeForCausalLM"], "model_type": "sdar_moe", "hidden_size": WIDTH,
        "num_hidden_layers": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
        "intermediate_size": HIDDEN, "moe_intermediate_size": 32, "num_experts": 128, "num_experts_per_tok": 8,
        "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [], "hidden_act": "silu",
        "rms_norm_eps": 1e-6, "rope_theta": 1000000, "rope_scaling": None, "max_position_embeddings": 32768,
        "vocab_size": VOCAB, "tie_word_embeddings": False, "attention_bias": False, "mask_token_id": 126,
        "eos_token_id": 127, "torch_dtype": "bfloat16", "auto_map": {"AutoConfig": "configuration_sdar_moe.Config"},
    },
    "llada2": {
        "architectures": ["LLaDA2MoeModelLM"], "model_type": "llada2_moe", "hidden_size": WIDTH,
        "num_hidden_layers": 20, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
        "intermediate_size": HIDDEN, "moe_intermediate_size": 32, "num_experts": 256, "num_experts_per_tok": 8,
        "num_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 8, "topk_group": 4,
        "routed_scaling_factor": 2.5, "score_function": "sigmoid", "moe_router_enable_expert_bias": True,
        "norm_topk_prob": True, "router_dtype": "fp32", "rope_theta": 600000, "partial_rotary_factor": 0.5,
        "rotary_dim": 16, "rope_scaling": None, "rms_norm_eps": 1e-6, "vocab_size": VOCAB, "use_bias": False,
        "use_qkv_bias": False, "hidden_act": "silu", "max_position_embeddings": 16384, "pad_token_id": 127,
        "tie_word_embeddings": False, "mask_token_id": 126, "torch_dtype": "bfloat16",
        "auto_map": {"AutoConfig": "configuration_llada2_moe.LLaDA2MoeConfig"},
    },
    "fast_dllm_v2": {
        "architectures": ["Fast_dLLM_QwenForCausalLM"], "model_type": "Fast_dLLM_Qwen", "hidden_size": WIDTH,
        "num_hidden_layers": 28, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": HIDDEN,
        "hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 1e6, "rope_scaling": None,
        "max_position_embeddings": 32768, "sliding_window": None, "use_sliding_window": False, "bd_size": 32,
        "layer_types": ["full_attention"] * 28, "vocab_size": VOCAB, "tie_word_embeddings": False,
        "mask_token_id": 126, "eos_token_id": 127, "torch_dtype": "bfloat16",
        "auto_map": {"AutoConfig": "configuration.Fast_dLLM_QwenConfig"},
    },
}  # fmt: skip
DENSE = ("llada", "dream")
FEWER_LAYERS = {"sdar_moe": 2, "llada2": 3}
BLOCKS = ("sdar", "sdar_moe", "llada2", "fast_dllm_v2")
HEADS = {"llada": "model.transformer.ff_out.weight", "dream": "lm_head.weight"}
EMBEDDINGS = {"llada": "model.transformer.wte.weight", "dream": "model.embed_tokens.weight"}
TIES = {"llada": "weight_tying", "dream": "tie_word_embeddings"}


def published(family: str, depth: int | None = None) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor; of a block-diffusion family with ``depth`` layers, where it is given."""
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
    elif family in BLOCKS:
        layers = layers if depth is None else depth
        return top_of(family) | {
            f"model.layers.{i}.{name}": size for i in range(layers) for name, size in block_layer(family, i).items()
        }
    elif family == "llada_moe":
        layer |= {f"self_attn.{name}_proj.weight": (d, d) for name in "qkv"}
        layer |= {f"self_attn.{name}_norm.weight": (d // 4,) for name in "qk"} | {"mlp.gate.weight": (64, d)}
        for e in range(64):
            layer |= {f"mlp.experts.{e}.{name}_proj.weight": (m, d) for name in ("gate", "up")}
            layer |= {f"mlp.experts.{e}.down_proj.weight": (d, m)}
    return top | {f"{prefix}.{i}.{name}": size for i in range(layers) for name, size in layer.items()}


def top_of(family: str) -> dict[str, tuple[int, ...]]:
    """Embedding, head and last norm."""
    embedding = "word_embeddings" if family == "llada2" else "embed_tokens"
    table = (VOCAB, WIDTH)
    return {f"model.{embedding}.weight": table, "model.norm.weight": (WIDTH,), "lm_head.weight": table}


def block_layer(family: str, i: int) -> dict[str, tuple[int, ...]]:
    """Layer ``i`` of a block-diffusion family; heads of 32 in a width of 64, but for Fast-dLLM v2's of 16."""
    d, m, head = WIDTH, HIDDEN, 16 if family == "fast_dllm_v2" else 32
    q, kv = 4 * head, 2 * head
    layer: dict[str, tuple[int, ...]] = {f"{name}_layernorm.weight": (d,) for name in ("input", "post_attention")}
    if family == "llada2":
        layer |= {"attention.query_key_value.weight": (q + 2 * kv, d), "attention.dense.weight": (d, q)}
        layer |= {f"attention.{name}_layernorm.weight": (head,) for name in ("query", "key")}
    else:
        layer |= {f"self_attn.{name}_proj.weight": (rows, d) for name, rows in (("q", q), ("k", kv), ("v", kv))}
        layer |= {"self_attn.o_proj.weight": (d, q)}
        if family == "fast_dllm_v2":
            layer |= {f"self_attn.{name}_proj.bias": (rows,) for name, rows in (("q", q), ("k", kv), ("v", kv))}
        else:
            layer |= {f"self_attn.{name}_norm.weight": (head,) for name in "qk"}
    mlps = {"mlp": m}
    if family == "sdar_moe" or (family == "llada2" and i > 0):
        experts = CONFIGS[family]["num_experts"]
        layer |= {"mlp.gate.weight": (experts, d)}
        mlps = {f"mlp.experts.{e}": 32 for e in range(experts)}
        if family == "llada2":
            layer |= {"mlp.gate.expert_bias": (experts,)}
            mlps["mlp.shared_experts"] = 32
    for name, width in mlps.items():
        layer |= {f"{name}.gate_proj.weight": (width, d), f"{name}.up_proj.weight": (width, d)}
        layer |= {f"{name}.down_proj.weight": (d, width)}
    return layer


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
    """Of a checkpoint with the layers of ``config(family)``."""
    shapes = published(family, FEWER_LAYERS.get(family))
    return {name: torch.randn(size).to(torch.bfloat16) for name, size in shapes.items()}


def config(family: str) -> dict[str, Any]:
    """Its config.json; of mixtures with hundreds of experts a few layers are loaded."""
    fewer = {"num_hidden_layers": FEWER_LAYERS[family]} if family in FEWER_LAYERS else {}
    return {**CONFIGS[family], **fewer}


COUNTS = {
    "llada": 291, "dream": 339, "llada_moe": 3219, "sdar": 399, "sdar_moe": 18867, "llada2": 14813, "fast_dllm_v2": 339,
}  # fmt: skip


@pytest.mark.parametrize("family", COUNTS)
def test_the_list_is_the_published_one(family: str) -> None:
    """All layers of it: names, shapes and their number."""
    architecture = CONFIGS[family]["architectures"][0]
    module, _, name = FAMILIES[architecture].model.partition(":")
    shape = FAMILIES[architecture].config_class().from_dict(CONFIGS[family]).shape()
    listed = getattr(import_module(module), name).tensor_shapes(shape)
    assert listed == published(family)
    assert len(listed) == COUNTS[family]


@pytest.mark.parametrize("family", COUNTS)
def test_published_list_loads_to_the_last_number(family: str, tmp_path: Path, load: Any) -> None:
    tensors = random_tensors(family)
    loaded = load(write(tmp_path, config(family), tensors))
    # LLaDA2's experts are chosen in fp32 whatever the checkpoint's type.
    names = {name.rpartition(".mlp.")[2] for name, dtype in loaded.dtypes.items() if dtype != torch.bfloat16}
    assert names == ({"gate.weight", "gate.expert_bias"} if family == "llada2" else set())
    assert set(loaded.dtypes.values()) <= {torch.bfloat16, torch.float32}
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
    victim = sorted(name for name in tensors if "k_proj." in name or "query_key_value" in name)[-1]
    if change == "missing":
        del tensors[victim]
    elif change == "unknown":
        victim = victim.replace("k_proj.", "k_other.").replace("query_key_value.", "query.")
        tensors[victim] = torch.zeros(4)
    else:
        tensors[victim] = torch.zeros(8, *tensors[victim].shape[1:])
    with pytest.raises(ValueError, match=victim):
        load(write(tmp_path, config(family), tensors))


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
