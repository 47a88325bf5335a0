"""Dream (Base, Instruct, Dream-Coder, DiffuCoder and their kin): the names of its tensors.

They are Qwen2.5's, from which Dream was made; so are this package's own, but for the leading ``model.``.
"""

from __future__ import annotations

from typing import ClassVar

from vllm.model_executor.models.utils import WeightsMapper

from vllm_d2cache.models.common import QKV, DiffusionLM
from vllm_d2cache.models.shape import TransformerShape


class DreamModel(DiffusionLM):
    """The architecture name of the published checkpoints."""

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
        """The published list (docs/methods/d2cache.md, section 9): 3 + 12 a layer."""
        d, q, kv, ff = shape.hidden_size, shape.q_size, shape.kv_size, shape.intermediate_size
        layer: dict[str, tuple[int, ...]] = {
            "input_layernorm.weight": (d,),
            "self_attn.q_proj.weight": (q, d),
            "self_attn.q_proj.bias": (q,),
            "self_attn.k_proj.weight": (kv, d),
            "self_attn.k_proj.bias": (kv,),
            "self_attn.v_proj.weight": (kv, d),
            "self_attn.v_proj.bias": (kv,),
            "self_attn.o_proj.weight": (d, q),
            "post_attention_layernorm.weight": (d,),
            "mlp.gate_proj.weight": (ff, d),
            "mlp.up_proj.weight": (ff, d),
            "mlp.down_proj.weight": (d, ff),
        }
        vocabulary = (shape.embedding_size, d)
        top = {"model.embed_tokens.weight": vocabulary, "model.norm.weight": (d,), "lm_head.weight": vocabulary}
        layers = {f"model.layers.{i}.{name}": size for i in range(shape.num_layers) for name, size in layer.items()}
        return top | layers
