"""LLaDA2.0 and 2.1 (mini, flash): the names of their tensors, which are Ling's. q, k and v come as one tensor."""

from __future__ import annotations

from typing import ClassVar

from vllm.model_executor.models.utils import WeightsMapper

from vllm_d2cache.models.common import DiffusionLM
from vllm_d2cache.models.qwen import mlp_shapes
from vllm_d2cache.models.shape import TransformerShape


class LLaDA2MoeModelLM(DiffusionLM):
    """The architecture name of the published checkpoints."""

    packed_modules_mapping: ClassVar[dict[str, list[str]]] = {"gate_up_proj": ["gate_proj", "up_proj"]}
    head_tensor = "lm_head.weight"
    # The routed experts' tensors are put in place by vLLM's fused layer.
    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_substr={
            ".attention.query_key_value.": ".self_attn.qkv_proj.",
            ".attention.query_layernorm.": ".self_attn.q_norm.",
            ".attention.key_layernorm.": ".self_attn.k_norm.",
            ".attention.dense.": ".self_attn.o_proj.",
        },
        orig_to_new_stacked={
            ".mlp.gate_proj.": (".mlp.gate_up_proj.", 0),
            ".mlp.up_proj.": (".mlp.gate_up_proj.", 1),
            ".shared_experts.gate_proj.": (".shared_experts.gate_up_proj.", 0),
            ".shared_experts.up_proj.": (".shared_experts.gate_up_proj.", 1),
        },
        orig_to_new_prefix={"model.word_embeddings.": "embed_tokens.", "model.": ""},
    )

    @staticmethod
    def tensor_shapes(shape: TransformerShape) -> dict[str, tuple[int, ...]]:
        """3 tensors; in each layer 6, and 3 of a plain MLP or 5 + 3 an expert of a mixture."""
        d, q, kv = shape.hidden_size, shape.q_size, shape.kv_size
        layer: dict[str, tuple[int, ...]] = {
            "input_layernorm.weight": (d,),
            "attention.query_key_value.weight": (q + 2 * kv, d),
            "attention.query_layernorm.weight": (shape.head_size,),
            "attention.key_layernorm.weight": (shape.head_size,),
            "attention.dense.weight": (d, q),
            "post_attention_layernorm.weight": (d,),
        }
        vocabulary = (shape.embedding_size, d)
        shapes = {"model.word_embeddings.weight": vocabulary, "model.norm.weight": (d,), "lm_head.weight": vocabulary}
        for i in range(shape.num_layers):
            layer_i = layer | mlp_shapes(shape, i)
            shapes |= {f"model.layers.{i}.{name}": size for name, size in layer_i.items()}
        return shapes
