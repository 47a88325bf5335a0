"""LLaDA (Base, Instruct, 1.5 and their kin): the names of its tensors.

``ff_out`` names both the LM head and each block's down projection in the checkpoint; the mapper keeps them apart.
"""

from __future__ import annotations

import re
from typing import ClassVar

from vllm.model_executor.models.utils import WeightsMapper

from vllm_d2cache.models.common import QKV, DiffusionLM
from vllm_d2cache.models.shape import TransformerShape


class LLaDAModelLM(DiffusionLM):
    """The architecture name of the published checkpoints."""

    packed_modules_mapping: ClassVar[dict[str, list[str]]] = {
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["ff_proj", "up_proj"],
    }
    head_tensor = "model.transformer.ff_out.weight"
    # Modules are renamed, not tensors: lists of what is quantised, and adapters, name modules alone.
    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_regex={
            re.compile(rf"(\.blocks\.\d+)\.{name}(?=\.|$)"): rf"\1.{ours}"
            for name, ours in {
                "attn_norm": "input_layernorm",
                "q_proj": "self_attn.q_proj",
                "k_proj": "self_attn.k_proj",
                "v_proj": "self_attn.v_proj",
                "attn_out": "self_attn.o_proj",
                "ff_norm": "post_attention_layernorm",
                "ff_proj": "mlp.ff_proj",
                "up_proj": "mlp.up_proj",
                "ff_out": "mlp.down_proj",
            }.items()
        },
        orig_to_new_stacked={
            **QKV,
            ".ff_proj.": (".gate_up_proj.", 0),
            ".up_proj.": (".gate_up_proj.", 1),
        },
        orig_to_new_prefix={
            "model.transformer.wte": "embed_tokens",
            "model.transformer.ln_f": "norm",
            "model.transformer.ff_out": "lm_head",
            "model.transformer.blocks": "layers",
        },
    )

    @staticmethod
    def tensor_shapes(shape: TransformerShape) -> dict[str, tuple[int, ...]]:
        """The published list (docs/methods/d2cache.md, section 9): 3 + 9 a layer."""
        d, q, kv, ff = shape.hidden_size, shape.q_size, shape.kv_size, shape.intermediate_size
        block: dict[str, tuple[int, ...]] = {
            "attn_norm": (d,),
            "q_proj": (q, d),
            "k_proj": (kv, d),
            "v_proj": (kv, d),
            "attn_out": (d, q),
            "ff_norm": (d,),
            "ff_proj": (ff, d),
            "up_proj": (ff, d),
            "ff_out": (d, ff),
        }
        vocabulary = (shape.embedding_size, d)
        top = {"wte": vocabulary, "ln_f": (d,), "ff_out": vocabulary}
        layers = {f"blocks.{i}.{name}": size for i in range(shape.num_layers) for name, size in block.items()}
        return {f"model.transformer.{name}.weight": size for name, size in (top | layers).items()}
