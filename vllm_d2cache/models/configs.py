"""Configuration classes, so that checkpoints load without their authors' remote code."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from typing import Any, ClassVar

from transformers import PretrainedConfig

from vllm_d2cache.canvas.traits import FamilyTraits
from vllm_d2cache.models.families import FAMILIES
from vllm_d2cache.models.mask_token import mask_contradiction
from vllm_d2cache.models.shape import Mixture, TransformerShape


class DiffusionLMConfig(PretrainedConfig):
    """What the plugin asks of every family's configuration."""

    alias_of: ClassVar[type | None] = None
    """The class that this one is under another model_type (see ``under``)."""

    supported_values: ClassVar[dict[str, tuple[Any, ...]]] = {}
    """Key of config.json -> the values the model class computes. Keys that are absent are not looked at."""

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Read config.json. Files of one family may have another's model_type: their architecture tells.

        Raises:
            ValueError: see ``check_fields``.
        """
        names = [name for name in config_dict.get("architectures") or () if isinstance(name, str) and name in FAMILIES]
        owner = FAMILIES[names[0]].config_class() if names else cls
        if owner not in (cls, cls.alias_of):
            return owner.from_dict(config_dict, **kwargs)
        cls.check_fields(config_dict)
        return super().from_dict(config_dict, **kwargs)

    @classmethod
    def check_fields(cls, config_dict: dict[str, Any]) -> None:
        """Where a family's files are checked field by field: raises ValueError for what no reader could take."""

    @classmethod
    @cache
    def under(cls, model_type: str) -> type[DiffusionLMConfig]:
        """This class for files with another ``model_type``: registries want it to be the class's own."""
        if model_type == cls.model_type:
            return cls
        # transformers gives a subclass without an __init__ of its own a generated one.
        namespace = {"model_type": model_type, "alias_of": cls, "__init__": cls.__init__, "__module__": cls.__module__}
        return type(cls.__name__, (cls,), namespace)

    def unsupported(self) -> list[str]:
        """Settings of the checkpoint that ask for something the model class does not do."""
        return [
            f"{key}={getattr(self, key)!r} (supported: {', '.join(map(repr, values))})"
            for key, values in self.supported_values.items()
            if hasattr(self, key) and getattr(self, key) not in values
        ]

    def unserved(self) -> str | None:
        """The architecture and why no checkpoint of it can be served yet; None if they are."""
        named = [(name, FAMILIES[name].unserved) for name in self.architectures or () if name in FAMILIES]
        return next((f"{name} yet: {reason}" for name, reason in named if reason is not None), None)

    def mask_contradiction(self, tokenizer_config: Mapping[str, Any]) -> str | None:
        """What tokenizer_config.json says otherwise of the mask token, or None."""
        return mask_contradiction(tokenizer_config, self.mask_token_id)

    def traits(self) -> FamilyTraits:
        """What the decoding loop must know of the family."""
        raise NotImplementedError

    def shape(self) -> TransformerShape:
        """What the network is built from."""
        raise NotImplementedError


class LLaDAConfig(DiffusionLMConfig):
    """LLaDA's config.json (docs/methods/d2cache.md, section 9) under the names vLLM looks for.

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
        super().__init__(**{**kwargs, "tie_word_embeddings": weight_tying})

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
        )


class HubConfig(DiffusionLMConfig):
    """A config.json under transformers' own names. Keys a checkpoint lacks, or has as null, come from ``defaults``."""

    defaults: ClassVar[dict[str, Any]] = {}

    def __init__(self, **kwargs: Any) -> None:
        kwargs.pop("model_type", None)
        given = {key: value for key, value in kwargs.items() if value is not None or key not in self.defaults}
        settings = {**self.defaults, **given}
        if settings.get("num_key_value_heads") is None:
            settings["num_key_value_heads"] = settings["num_attention_heads"]
        # Files written by newer versions of transformers hold theta and type in one entry.
        scaling = settings.pop("rope_scaling", None)
        rope = settings.pop("rope_parameters", None) or scaling or {}
        settings["rope_theta"] = rope.get("rope_theta", settings["rope_theta"])
        settings["rope_type"] = rope.get("rope_type", rope.get("type", "default"))
        if "partial_rotary_factor" in rope:
            settings["partial_rotary_factor"] = rope["partial_rotary_factor"]
        super().__init__(**settings)

    def unsupported(self) -> list[str]:
        """As for all families, and what ``--hf-overrides`` may have changed of RoPE after the file was read."""
        rope = getattr(self, "rope_parameters", None)
        rope = rope if isinstance(rope, dict) else {}
        # vLLM puts "default" there where the file's own entry has been taken out: that is not the operator's word.
        changed = rope.get("rope_type", rope.get("type", "default"))
        problems = [] if changed == "default" else [f"rope_type={changed!r} (supported: 'default')"]
        theta = rope.get("rope_theta", self.rope_theta)
        if theta != self.rope_theta:
            problems.append(f"rope_theta={self.rope_theta} but rope_parameters has {theta} (must agree)")
        return [*super().unsupported(), *problems]

    def shape(self) -> TransformerShape:
        """What all families under these names have in common."""
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
            tied_head=self.tie_word_embeddings,
            head_dim=getattr(self, "head_dim", None),
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
        "hidden_act": ("silu",),
        "use_sliding_window": (False,),
        "use_mrope": (False,),
        "rope_type": ("default",),
        "partial_rotary_factor": (1, None),
    }

    # transformers gives a subclass without an __init__ of its own a generated one.
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)

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
