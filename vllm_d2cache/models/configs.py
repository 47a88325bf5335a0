"""Configuration classes, so that checkpoints load without their authors' remote code."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

from vllm_d2cache.canvas.traits import FamilyTraits
from vllm_d2cache.models.base_configs import DiffusionLMConfig, HubConfig
from vllm_d2cache.models.shape import Mixture, TransformerShape

# How files of block-diffusion models name the length of a block: here a row sees all of its text.
_NO_BLOCKS: dict[str, tuple[Any, ...]] = {"block_size": (None,), "bd_size": (None,), "block_length": (None,)}


class LLaDAConfig(DiffusionLMConfig):
    """LLaDA's config.json (docs/methods/d2cache.md, section 9) under the names vLLM looks for."""

    model_type = "llada"
    scales_rope = True
    attribute_map: ClassVar[dict[str, str]] = {
        "hidden_size": "d_model",
        "num_attention_heads": "n_heads",
        "num_key_value_heads": "n_kv_heads",
        "num_hidden_layers": "n_layers",
        "intermediate_size": "mlp_hidden_size",
        "max_position_embeddings": "max_sequence_length",
        "tie_word_embeddings": "weight_tying",
    }
    defaults: ClassVar[dict[str, Any]] = {
        "d_model": 4096,
        "n_heads": 32,
        "n_layers": 32,
        "mlp_ratio": 4,
        "max_sequence_length": 4096,
        "vocab_size": 126464,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "mask_token_id": 126336,
        "weight_tying": False,
    }
    supported_values: ClassVar[dict[str, tuple[Any, ...]]] = {
        **_NO_BLOCKS,
        "activation_type": ("silu",),
        "block_type": ("llama",),
        "layer_norm_type": ("rms",),
        "rope": (True,),
        "alibi": (False,),
        "attention_layer_norm": (False,),
        "input_emb_norm": (False,),
        "scale_logits": (False,),
        "include_bias": (False,),
        "include_qkv_bias": (False, None),
        "bias_for_layer_norm": (False, None),
        "layer_norm_with_affine": (True,),
        "multi_query_attention": (None, False),
        "clip_qkv": (None,),
    }

    def __init__(self, **kwargs: Any) -> None:
        kwargs.pop("tie_word_embeddings", None)  # the authors' code reads weight_tying alone
        super().__init__(**kwargs)

    def settle(self) -> None:
        """As for all families; what null means for sizes that follow from others."""
        super().settle()
        for key, default in {
            "n_kv_heads": self.n_heads,
            "embedding_size": self.vocab_size,
            "mlp_hidden_size": self._mlp_width(),
        }.items():
            if getattr(self, key, None) is None:
                setattr(self, key, default)

    def _mlp_width(self) -> Any:
        sizes = (self.mlp_ratio, self.d_model)
        return self.mlp_ratio * self.d_model if all(isinstance(size, int) for size in sizes) else None

    def traits(self) -> FamilyTraits:
        """A canvas slot reads the logits of its own position."""
        return FamilyTraits(self.mask_token_id, num_layers=self.n_layers)

    def shape(self) -> TransformerShape:
        """No bias anywhere; the published model rotates in fp32 (rope_full_precision)."""
        return TransformerShape(
            hidden_size=self.d_model,
            num_layers=self.n_layers,
            num_heads=self.n_heads,
            num_kv_heads=self.n_kv_heads,
            intermediate_size=self.mlp_hidden_size,
            vocab_size=self.vocab_size,
            embedding_size=self.embedding_size,
            max_positions=self.max_sequence_length,
            norm_eps=self.rms_norm_eps,
            rope_theta=self.rope_theta,
            rope_in_fp32=True,
            tied_head=self.weight_tying,
            rope_scaling=self.rope_scaling_of(self.max_sequence_length),
        )


class LLaDAMoEConfig(HubConfig):
    """LLaDA-MoE's config.json (docs/models.md has where its facts come from)."""

    model_type = "lladamoe"
    attribute_map: ClassVar[dict[str, str]] = {"intermediate_size": "expert_intermediate_size"}
    defaults: ClassVar[dict[str, Any]] = {
        "vocab_size": 157184,
        "hidden_size": 2048,
        "expert_intermediate_size": 1024,
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "moe_layer_freq": 1,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 50000.0,
        # The published config.json does not name it; the model card does.
        "mask_token_id": 156895,
        "tie_word_embeddings": False,
    }
    supported_values: ClassVar[dict[str, tuple[Any, ...]]] = {
        **_NO_BLOCKS,
        "hidden_act": ("silu",),
        "attention_bias": (False,),
        "qk_layernorm": (True,),
        "partial_rotary_factor": (1, None),
        "norm_topk_prob": (False, None),
        "shared_expert_intermediate_size": (None, 0),
        "routed_scaling_factor": (1, None),
        "router_num_group": (None,),
        "router_topk_group": (None,),
        "moe_router_enable_expert_bias": (False, None),
        "moe_router_score_function": ("softmax", None),
        "layers_without_experts": (0,),
    }

    # transformers gives a subclass without an __init__ of its own a generated one.
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)

    @property
    def layers_without_experts(self) -> int:
        """How many layers have a plain MLP, or are not spoken of."""
        every = self.moe_layer_freq
        if not isinstance(every, list):
            every = [int(every == 1)] * self.num_hidden_layers
        return every.count(0) + abs(self.num_hidden_layers - len(every))

    def traits(self) -> FamilyTraits:
        """A canvas slot reads the logits of its own position."""
        return FamilyTraits(self.mask_token_id, num_layers=self.num_hidden_layers)

    def shape(self) -> TransformerShape:
        """Experts in every layer, norms over the heads of q and k, no bias."""
        return replace(
            super().shape(),
            qk_norm=True,
            mixture=Mixture(self.num_experts, self.num_experts_per_tok, self.intermediate_size),
        )


class DreamConfig(HubConfig):
    """Dream's config.json (docs/methods/d2cache.md, section 9): Qwen2.5's keys and a mask token."""

    model_type = "Dream"
    defaults: ClassVar[dict[str, Any]] = {
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "mask_token_id": 151666,
        "tie_word_embeddings": False,
    }
    supported_values: ClassVar[dict[str, tuple[Any, ...]]] = {
        **_NO_BLOCKS,
        "hidden_act": ("silu",),
        "use_sliding_window": (False,),
        "use_mrope": (False,),
    }

    scales_rope = True
    pads_behind_text = True

    # transformers gives a subclass without an __init__ of its own a generated one.
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)

    def notes(self) -> list[str]:
        """Variants that infill texts of any length mark where a mask may become more than one."""
        if getattr(self, "expand_token_id", None) is None:
            return []
        return [f"expand_token_id={self.expand_token_id!r} has no effect: a canvas keeps its length"]

    def traits(self) -> FamilyTraits:
        """Made from an autoregressive model: a position predicts the token to its right."""
        return FamilyTraits(
            self.mask_token_id,
            logit_shift=1,
            step_schedule="timestep",
            num_layers=self.num_hidden_layers,
            family="dream",
        )

    def shape(self) -> TransformerShape:
        """Biases on q, k and v alone; q and k are rotated in the model's dtype."""
        return replace(super().shape(), qkv_bias=True)
