"""Configuration classes, so that checkpoints load without their authors' remote code."""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import PretrainedConfig

from vllm_d2cache.models.shape import TransformerShape
from vllm_d2cache.records import FamilyTraits


class DiffusionLMConfig(PretrainedConfig):
    """What the plugin asks of every family's configuration."""

    supported_values: ClassVar[dict[str, tuple[Any, ...]]] = {}
    """Key of config.json -> the values the model class computes. Keys that are absent are not looked at."""

    def unsupported(self) -> list[str]:
        """Settings of the checkpoint that ask for something the model class does not do."""
        return [
            f"{key}={getattr(self, key)!r} (supported: {', '.join(map(repr, values))})"
            for key, values in self.supported_values.items()
            if hasattr(self, key) and getattr(self, key) not in values
        ]

    def traits(self) -> FamilyTraits:
        """What the decoding loop must know of the family."""
        raise NotImplementedError

    def shape(self) -> TransformerShape:
        """What the network is built from."""
        raise NotImplementedError


class LLaDAConfig(DiffusionLMConfig):
    """LLaDA's config.json (d2cache.md, section 9) under the names vLLM looks for.

    Keys this class does not name are kept as attributes.
    """

    model_type = "llada"
    attribute_map: ClassVar[dict[str, str]] = {
        "hidden_size": "d_model",
        "num_attention_heads": "n_heads",
        "num_key_value_heads": "n_kv_heads",
        "num_hidden_layers": "n_layers",
        "intermediate_size": "mlp_hidden_size",
        "max_position_embeddings": "max_sequence_length",
        "tie_word_embeddings": "weight_tying",
    }
    supported_values: ClassVar[dict[str, tuple[Any, ...]]] = {
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

    def __init__(
        self,
        d_model: int = 4096,
        n_heads: int = 32,
        n_kv_heads: int | None = None,
        n_layers: int = 32,
        mlp_hidden_size: int | None = None,
        mlp_ratio: int = 4,
        max_sequence_length: int = 4096,
        vocab_size: int = 126464,
        embedding_size: int | None = None,
        rms_norm_eps: float = 1e-5,
        rope_theta: float = 500000.0,
        mask_token_id: int = 126336,
        weight_tying: bool = False,
        **kwargs: Any,
    ) -> None:
        self.d_model = d_model
        self.n_heads = n_heads
        self.n_kv_heads = n_heads if n_kv_heads is None else n_kv_heads
        self.n_layers = n_layers
        self.mlp_hidden_size = mlp_ratio * d_model if mlp_hidden_size is None else mlp_hidden_size
        self.mlp_ratio = mlp_ratio
        self.max_sequence_length = max_sequence_length
        self.vocab_size = vocab_size
        self.embedding_size = vocab_size if embedding_size is None else embedding_size
        self.rms_norm_eps = rms_norm_eps
        self.rope_theta = rope_theta
        self.mask_token_id = mask_token_id
        self.weight_tying = weight_tying
        kwargs.pop("tie_word_embeddings", None)
        super().__init__(tie_word_embeddings=weight_tying, **kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """LLaDA-MoE's published config.json has LLaDA's model_type, too; its architecture tells."""
        if cls is LLaDAConfig and LLaDAMoEConfig.architecture in (config_dict.get("architectures") or ()):
            return LLaDAMoEConfig.from_dict(config_dict, **kwargs)
        return super().from_dict(config_dict, **kwargs)

    def traits(self) -> FamilyTraits:
        """A canvas slot reads the logits of its own position."""
        return FamilyTraits(self.mask_token_id)

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
        )


class LLaDAMoEConfig(DiffusionLMConfig):
    """LLaDA-MoE's config.json (docs/models.md has where its facts come from)."""

    model_type = "lladamoe"
    architecture: ClassVar[str] = "LLaDAMoEModelLM"
    supported_values: ClassVar[dict[str, tuple[Any, ...]]] = {
        "hidden_act": ("silu",),
        "attention_bias": (False,),
        "qk_layernorm": (True,),
        "partial_rotary_factor": (1, None),
        "rope_type": ("default",),
        "norm_topk_prob": (False, None),
        "shared_expert_intermediate_size": (None, 0),
        "routed_scaling_factor": (1, None),
        "router_num_group": (None,),
        "router_topk_group": (None,),
        "moe_router_enable_expert_bias": (False, None),
        "moe_router_score_function": ("softmax", None),
        "layers_without_experts": (0,),
    }

    def __init__(
        self,
        vocab_size: int = 157184,
        hidden_size: int = 2048,
        expert_intermediate_size: int = 1024,
        num_hidden_layers: int = 16,
        num_attention_heads: int = 16,
        num_key_value_heads: int | None = None,
        num_experts: int = 64,
        num_experts_per_tok: int = 8,
        moe_layer_freq: list[int] | int = 1,
        max_position_embeddings: int = 8192,
        rms_norm_eps: float = 1e-5,
        rope_theta: float = 50000.0,
        rope_scaling: dict[str, Any] | None = None,
        mask_token_id: int | None = None,
        tie_word_embeddings: bool = False,
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.expert_intermediate_size = expert_intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_attention_heads if num_key_value_heads is None else num_key_value_heads
        self.num_experts = num_experts
        self.num_experts_per_tok = num_experts_per_tok
        self.moe_layer_freq = moe_layer_freq
        every = moe_layer_freq if isinstance(moe_layer_freq, list) else [int(moe_layer_freq == 1)] * num_hidden_layers
        self.layers_without_experts = every.count(0) + abs(num_hidden_layers - len(every))
        self.max_position_embeddings = max_position_embeddings
        self.rms_norm_eps = rms_norm_eps
        rope = kwargs.pop("rope_parameters", None) or rope_scaling or {}
        self.rope_theta = rope.get("rope_theta", rope_theta)
        self.rope_type = rope.get("rope_type", rope.get("type", "default"))
        # The published config.json does not name it; the model card does.
        self.mask_token_id = 156895 if mask_token_id is None else mask_token_id
        kwargs.pop("model_type", None)
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)

    def traits(self) -> FamilyTraits:
        """A canvas slot reads the logits of its own position."""
        return FamilyTraits(self.mask_token_id)

    def shape(self) -> TransformerShape:
        """Experts in every layer, norms over the heads of q and k, no bias."""
        return TransformerShape(
            hidden_size=self.hidden_size,
            num_layers=self.num_hidden_layers,
            num_heads=self.num_attention_heads,
            num_kv_heads=self.num_key_value_heads,
            intermediate_size=self.expert_intermediate_size,
            vocab_size=self.vocab_size,
            embedding_size=self.vocab_size,
            max_positions=self.max_position_embeddings,
            norm_eps=self.rms_norm_eps,
            rope_theta=self.rope_theta,
            tied_head=self.tie_word_embeddings,
            qk_norm=True,
            num_experts=self.num_experts,
            experts_per_token=self.num_experts_per_tok,
        )


class DreamConfig(DiffusionLMConfig):
    """Dream's config.json (d2cache.md, section 9): Qwen2.5's keys and a mask token."""

    model_type = "Dream"
    supported_values: ClassVar[dict[str, tuple[Any, ...]]] = {
        "hidden_act": ("silu",),
        "use_sliding_window": (False,),
        "use_mrope": (False,),
        "rope_type": ("default",),
    }

    def __init__(
        self,
        vocab_size: int = 152064,
        hidden_size: int = 3584,
        intermediate_size: int = 18944,
        num_hidden_layers: int = 28,
        num_attention_heads: int = 28,
        num_key_value_heads: int | None = 4,
        max_position_embeddings: int = 131072,
        rms_norm_eps: float = 1e-6,
        rope_theta: float = 1000000.0,
        rope_scaling: dict[str, Any] | None = None,
        mask_token_id: int = 151666,
        tie_word_embeddings: bool = False,
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_attention_heads if num_key_value_heads is None else num_key_value_heads
        self.max_position_embeddings = max_position_embeddings
        self.rms_norm_eps = rms_norm_eps
        # Files written by newer versions of transformers hold both in one entry.
        rope = kwargs.pop("rope_parameters", None) or rope_scaling or {}
        self.rope_theta = rope.get("rope_theta", rope_theta)
        self.rope_type = rope.get("rope_type", rope.get("type", "default"))
        self.mask_token_id = mask_token_id
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)

    def traits(self) -> FamilyTraits:
        """Made from an autoregressive model: a position predicts the token to its right."""
        return FamilyTraits(self.mask_token_id, logit_shift=1)

    def shape(self) -> TransformerShape:
        """Biases on q, k and v alone; q and k are rotated in the model's dtype."""
        return TransformerShape(
            hidden_size=self.hidden_size,
            num_layers=self.num_hidden_layers,
            num_heads=self.num_attention_heads,
            num_kv_heads=self.num_key_value_heads,
            intermediate_size=self.intermediate_size,
            vocab_size=self.vocab_size,
            embedding_size=self.vocab_size,
            max_positions=self.max_position_embeddings,
            norm_eps=self.rms_norm_eps,
            rope_theta=self.rope_theta,
            qkv_bias=True,
            tied_head=self.tie_word_embeddings,
        )
