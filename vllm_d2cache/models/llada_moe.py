"""LLaDA-MoE (7B-A1B Base and Instruct): the names of its tensors. docs/models.md has where they come from."""

from __future__ import annotations

from typing import ClassVar

from vllm.model_executor.models.utils import WeightsMapper

from vllm_d2cache.models.common import QKV, DiffusionLM
from vllm_d2cache.models.shape import TransformerShape


class LLaDAMoEModelLM(DiffusionLM):
    """The architecture name of the published checkpoints."""

    packed_modules_mapping: ClassVar[dict[str, list[str]]] = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
    head_tensor = "lm_head.weight"
    # The experts' tensors are put in place by vLLM's fused layer.
    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_stacked=QKV,
        orig_to_new_prefix={"model.": ""},
    )

    @staticmethod
    def tensor_shapes(shape: TransformerShape) -> dict[str, tuple[int, ...]]:
        """3 tensors, and 9 + 3 an expert in each layer."""
        d, q, kv = shape.hidden_size, shape.q_size, shape.kv_size
        assert shape.mixture is not None
        experts, ff = shape.mixture.num_experts, shape.mixture.width
        layer: dict[str, tuple[int, ...]] = {
            "input_layernorm": (d,),
            "self_attn.q_proj": (q, d),
            "self_attn.k_proj": (kv, d),
            "self_attn.v_proj": (kv, d),
            "self_attn.o_proj": (d, q),
            "self_attn.q_norm": (shape.head_size,),
            "self_attn.k_norm": (shape.head_size,),
            "post_attention_layernorm": (d,),
            "mlp.gate": (experts, d),
        }
        for e in range(experts):
            expert = f"mlp.experts.{e}"
            layer |= {f"{expert}.gate_proj": (ff, d), f"{expert}.up_proj": (ff, d), f"{expert}.down_proj": (d, ff)}
        vocabulary = (shape.embedding_size, d)
        top = {"model.embed_tokens": vocabulary, "model.norm": (d,), "lm_head": vocabulary}
        layers = {f"model.layers.{i}.{name}": size for i in range(shape.num_layers) for name, size in layer.items()}
        return {f"{name}.weight": size for name, size in (top | layers).items()}
