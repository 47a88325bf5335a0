"""The names that Qwen gives to its tensors, which most families have kept: a model class is then one line."""

from __future__ import annotations

from typing import ClassVar

from vllm.model_executor.models.utils import WeightsMapper

from vllm_d2cache.models.common import QKV, DiffusionLM
from vllm_d2cache.models.shape import TransformerShape


class QwenNames(DiffusionLM):
    """Layers whose MLP is a plain one."""

    packed_modules_mapping: ClassVar[dict[str, list[str]]] = {
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }
    head_tensor = "lm_head.weight"
    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_stacked={
            **QKV,
            ".gate_proj.": (".gate_up_proj.", 0),
            ".up_proj.": (".gate_up_proj.", 1),
        },
        orig_to_new_prefix={"model.": ""},
    )

    @staticmethod
    def tensor_shapes(shape: TransformerShape) -> dict[str, tuple[int, ...]]:
        """3 tensors, and in each layer 6 of attention and norms, 3 of biases, 2 of norms of q and k, and the MLP's."""
        d, q, kv = shape.hidden_size, shape.q_size, shape.kv_size
        layer: dict[str, tuple[int, ...]] = {
            "input_layernorm.weight": (d,),
            "self_attn.q_proj.weight": (q, d),
            "self_attn.k_proj.weight": (kv, d),
            "self_attn.v_proj.weight": (kv, d),
            "self_attn.o_proj.weight": (d, q),
            "post_attention_layernorm.weight": (d,),
        }
        if shape.qkv_bias:
            layer |= {f"self_attn.{name}_proj.bias": (rows,) for name, rows in (("q", q), ("k", kv), ("v", kv))}
        if shape.qk_norm:
            layer |= {f"self_attn.{name}_norm.weight": (shape.head_size,) for name in "qk"}
        vocabulary = (shape.embedding_size, d)
        shapes = {"model.embed_tokens.weight": vocabulary, "model.norm.weight": (d,), "lm_head.weight": vocabulary}
        for i in range(shape.num_layers):
            layer_i = layer | mlp_shapes(shape, i)
            shapes |= {f"model.layers.{i}.{name}": size for name, size in layer_i.items()}
        return shapes


class QwenMoeNames(QwenNames):
    """Layers whose MLP is a mixture. The experts' tensors are put in place by vLLM's fused layer."""

    packed_modules_mapping: ClassVar[dict[str, list[str]]] = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
    hf_to_vllm_mapper = WeightsMapper(orig_to_new_stacked=QKV, orig_to_new_prefix={"model.": ""})


def mlp_shapes(shape: TransformerShape, layer: int) -> dict[str, tuple[int, ...]]:
    """Tensors of one layer's MLP: 3 of a plain one; of a mixture its router's, 3 an expert and the shared one's 3."""
    d, mixture = shape.hidden_size, shape.mixture_of(layer)
    if mixture is None:
        return _gated("mlp", d, shape.intermediate_size)
    shapes: dict[str, tuple[int, ...]] = {"mlp.gate.weight": (mixture.num_experts, d)}
    if mixture.bias:
        shapes["mlp.gate.expert_bias"] = (mixture.num_experts,)
    for e in range(mixture.num_experts):
        shapes |= _gated(f"mlp.experts.{e}", d, mixture.width)
    if mixture.shared_width:
        shapes |= _gated("mlp.shared_experts", d, mixture.shared_width)
    return shapes


def _gated(prefix: str, d: int, width: int) -> dict[str, tuple[int, ...]]:
    return {
        f"{prefix}.gate_proj.weight": (width, d),
        f"{prefix}.up_proj.weight": (width, d),
        f"{prefix}.down_proj.weight": (d, width),
    }
