"""A dense LLaDA-MoE, every expert computed for every row: the oracle of the engine's model (docs/models.md)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tests.reference.dense import DenseModel
from tests.reference.dream import DenseDream

CONFIG: dict[str, Any] = {
    "architectures": ["LLaDAMoEModelLM"], "model_type": "llada", "hidden_size": 64, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 4, "num_experts": 8, "num_experts_per_tok": 2,
    "expert_intermediate_size": 32, "dense_intermediate_size": 128, "shared_expert_intermediate_size": None,
    "moe_layer_freq": [1, 1, 1], "hidden_act": "silu", "qk_layernorm": True, "attention_bias": False,
    "rms_norm_eps": 1e-5, "rope_theta": 50000, "rope_scaling": None, "partial_rotary_factor": 1,
    "norm_topk_prob": None, "routed_scaling_factor": 1, "router_num_group": None, "router_topk_group": None,
    "moe_router_enable_expert_bias": False, "max_position_embeddings": 8192, "vocab_size": 384,
    "tie_word_embeddings": False, "eos_token_id": 371, "pad_token_id": 371, "mask_token_id": 370, "use_cache": False,
    "auto_map": {"AutoConfig": "configuration_lladamoe.LLaDAConfig", "AutoModel": "modeling_lladamoe.LLaDAMoEModel"},
}  # fmt: skip
_EXTRA = {"q_norm": "qnorm", "k_norm": "knorm", "gate": "router"}


class DenseLladaMoe(DenseModel):
    """A checkpoint in LLaDA-MoE's layout."""

    keys_of_config = DenseDream.keys_of_config

    @staticmethod
    def common_name(name: str) -> str:
        """As Dream's, but for the norms of q and k, the router (i.router) and the experts (i.e.gate, ...)."""
        *path, module, _ = name.split(".")
        numbers = ".".join(part for part in path if part.isdigit())
        if module in _EXTRA:
            return f"{numbers}.{_EXTRA[module]}"
        common = DenseDream.common_name(name).rpartition(".")[2]
        return f"{numbers}.{common}" if numbers else common

    def _mlp(self, x: torch.Tensor, layer: int) -> torch.Tensor:
        probabilities = self._linear(x, f"{layer}.router").softmax(-1)
        best = probabilities.topk(self.config["num_experts_per_tok"], -1)
        weight = torch.zeros_like(probabilities).scatter_(1, best.indices, best.values)
        outputs = [self._gated(x, f"{layer}.{e}.") for e in range(self.config["num_experts"])]
        return (torch.stack(outputs, -1) * weight.unsqueeze(1)).sum(-1)


def write_random(directory: Path) -> Path:
    """A random checkpoint with the published names."""
    generator = torch.Generator().manual_seed(0)
    d, ff, heads = CONFIG["hidden_size"], CONFIG["expert_intermediate_size"], CONFIG["num_attention_heads"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens": (384, d), "lm_head": (384, d), "model.norm": (d,)}
    for i in range(CONFIG["num_hidden_layers"]):
        p = f"model.layers.{i}"
        shapes |= {f"{p}.self_attn.{name}_proj": (d, d) for name in "qkvo"}
        shapes |= {f"{p}.self_attn.{name}_norm": (d // heads,) for name in "qk"}
        shapes |= {f"{p}.input_layernorm": (d,), f"{p}.post_attention_layernorm": (d,)}
        shapes |= {f"{p}.mlp.gate": (CONFIG["num_experts"], d)}
        for e in range(CONFIG["num_experts"]):
            shapes |= {f"{p}.mlp.experts.{e}.{name}_proj": (ff, d) for name in ("gate", "up")}
            shapes |= {f"{p}.mlp.experts.{e}.down_proj": (d, ff)}
    tensors = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        tensors[f"{name}.weight"] = 1 + 0.1 * noise if len(shape) == 1 else noise * 2 / shape[1] ** 0.5
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(CONFIG))
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory
