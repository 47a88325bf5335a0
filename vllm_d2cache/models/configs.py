"""Configuration classes, so that checkpoints load without their authors' remote code."""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import PretrainedConfig


class LLaDAConfig(PretrainedConfig):
    """LLaDA's config.json (d2cache.md, section 9) under the names vLLM looks for.

    Keys this class does not name are kept as attributes. ``check`` refuses variants of the architecture that the
    model class does not compute.
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

    def unsupported(self) -> list[str]:
        """Settings of the checkpoint that ask for something the model class does not do."""
        expected = {
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
        return [
            f"{key}={getattr(self, key)!r} (supported: {', '.join(map(repr, values))})"
            for key, values in expected.items()
            if hasattr(self, key) and getattr(self, key) not in values
        ]
