"""Configurations of the block-diffusion families: a row sees its own block of positions and all earlier ones.

What all published checkpoints of a family have in common has a default here. What they differ in must stand in
config.json, but for the mask token and the block length, which most of them leave out.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any, ClassVar

from vllm_d2cache.canvas.traits import FamilyTraits
from vllm_d2cache.models.base_configs import HubConfig
from vllm_d2cache.models.shape import Mixture, TransformerShape

# Whatever word a file has for the block length.
_BLOCK_KEYS = ("block_size", "bd_size", "block_length")


class BlockDiffusionConfig(HubConfig):
    """What these families have in common."""

    default_block_length: ClassVar[int]
    logit_shift: ClassVar[int] = 0
    default_threshold: ClassVar[float]
    null_is_absent: ClassVar[bool] = False
    required: ClassVar[tuple[str, ...]] = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "max_position_embeddings",
        "rope_theta",
    )
    supported_values: ClassVar[dict[str, tuple[Any, ...]]] = {
        "hidden_act": ("silu",),
        "use_sliding_window": (False, None),
    }

    # transformers gives a subclass without an __init__ of its own a generated one.
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)

    def disagreements(self) -> list[str]:
        """The block length under several names."""
        given = self._given_block_lengths()
        if len(set(given.values())) < 2:
            return []
        return [" but ".join(f"{key}={value}" for key, value in given.items()) + " (must agree)"]

    def _given_block_lengths(self) -> dict[str, int]:
        given = {key: getattr(self, key, None) for key in _BLOCK_KEYS}
        return {key: value for key, value in given.items() if value is not None}

    def decoding_defaults(self) -> dict[str, Any]:
        """Those of the published ``generate`` or, where it has none, of the authors' evaluation (docs/models.md)."""
        return {"policy": "block", "threshold": self.default_threshold}

    def traits(self) -> FamilyTraits:
        """The block length is config.json's, else the family's."""
        return FamilyTraits(
            self.mask_token_id,
            logit_shift=self.logit_shift,
            step_schedule="window",
            num_layers=self.num_hidden_layers,
            family=self.model_type,
            block_length=next(iter(self._given_block_lengths().values()), self.default_block_length),
        )


class SDARConfig(BlockDiffusionConfig):
    """SDAR's and TraDo's config.json: Qwen3's keys (docs/models.md)."""

    model_type = "sdar"
    default_block_length: ClassVar[int] = 4
    default_threshold: ClassVar[float] = 0.85
    defaults: ClassVar[dict[str, Any]] = {
        "vocab_size": 151936,
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "mask_token_id": 151669,
        "eos_token_id": [151645, 151643],
        "tie_word_embeddings": False,
    }
    supported_values: ClassVar[dict[str, tuple[Any, ...]]] = {
        **BlockDiffusionConfig.supported_values,
        "attention_bias": (False,),
        "partial_rotary_factor": (1, None),
    }

    # transformers gives a subclass without an __init__ of its own a generated one.
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)

    def disagreements(self) -> list[str]:
        """Published files do not say their block length; the name of the checkpoint does."""
        named = re.search(r"-b(\d+)/?$", str(self.name_or_path))
        ours = self.traits().block_length
        problems = super().disagreements()
        if named and int(named[1]) != ours and not self._given_block_lengths():
            problems.append(
                f"no block_size, which would mean {ours}, but the checkpoint's name says blocks of {named[1]} "
                f"(--hf-overrides '{{\"block_size\": {named[1]}}}')"
            )
        return problems

    def shape(self) -> TransformerShape:
        """Norms over the heads of q and k, no bias."""
        return replace(super().shape(), qk_norm=True)


class SDARMoeConfig(SDARConfig):
    """SDAR-MoE's config.json: Qwen3-MoE's keys (docs/models.md)."""

    model_type = "sdar_moe"
    defaults: ClassVar[dict[str, Any]] = {
        **SDARConfig.defaults,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 48,
        "num_key_value_heads": 4,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
    }
    required: ClassVar[tuple[str, ...]] = (
        *SDARConfig.required,
        "moe_intermediate_size",
        "num_experts",
        "num_experts_per_tok",
    )
    supported_values: ClassVar[dict[str, tuple[Any, ...]]] = {
        **SDARConfig.supported_values,
        "norm_topk_prob": (True,),
        "decoder_sparse_step": (1,),
        "mlp_only_layers": ([], None),
    }

    # transformers gives a subclass without an __init__ of its own a generated one.
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)

    def shape(self) -> TransformerShape:
        """Experts in every layer; the weights of the chosen are made to sum to one."""
        mixture = Mixture(self.num_experts, self.num_experts_per_tok, self.moe_intermediate_size, renormalised=True)
        return replace(super().shape(), mixture=mixture)


class LLaDA2Config(BlockDiffusionConfig):
    """LLaDA2.0's and 2.1's config.json: Ling's keys (docs/models.md)."""

    model_type = "llada2_moe"
    default_block_length: ClassVar[int] = 32
    default_threshold: ClassVar[float] = 0.95
    defaults: ClassVar[dict[str, Any]] = {
        "vocab_size": 157184,
        "hidden_size": 2048,
        "intermediate_size": 5120,
        "moe_intermediate_size": 512,
        "num_hidden_layers": 20,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "max_position_embeddings": 16384,
        "rms_norm_eps": 1e-6,
        "rope_theta": 600000.0,
        "num_experts": 256,
        "num_experts_per_tok": 8,
        "num_shared_experts": 1,
        "first_k_dense_replace": 1,
        "n_group": 8,
        "topk_group": 4,
        "routed_scaling_factor": 2.5,
        "tie_word_embeddings": False,
        # No published config.json names either; the released code does.
        "mask_token_id": 156895,
        "eos_token_id": 156892,
    }
    required: ClassVar[tuple[str, ...]] = (*BlockDiffusionConfig.required, "moe_intermediate_size")
    supported_values: ClassVar[dict[str, tuple[Any, ...]]] = {
        **BlockDiffusionConfig.supported_values,
        "partial_rotary_factor": (),
        "use_bias": (False,),
        "use_qkv_bias": (False,),
        "use_qk_norm": (True, None),
        "use_rmsnorm": (True,),
        "norm_topk_prob": (True, None),
        "norm_head": (False,),
        "norm_softmax": (False,),
        "score_function": ("sigmoid",),
        "moe_router_enable_expert_bias": (True,),
        "router_dtype": ("fp32",),
    }

    # transformers gives a subclass without an __init__ of its own a generated one.
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)

    def unsupported(self) -> list[str]:
        """LLaDA2.2 has the same architecture name and another network."""
        capacity = getattr(self, "expert_capacity", None)
        if capacity is None:
            return super().unsupported()
        return [
            f"expert_capacity={capacity!r}: this is LLaDA2.2, whose experts are first chosen for a whole block (block "
            "routing), so that a row depends on which others are computed with it (supported: LLaDA2.0 and 2.1)"
        ]

    def disagreements(self) -> list[str]:
        problems = super().disagreements()
        factor = getattr(self, "partial_rotary_factor", None)
        rotated, said = self.shape().rotary_dim, getattr(self, "rotary_dim", None)
        if said is not None and factor is not None and said != rotated:
            problems.append(f"rotary_dim={said} but partial_rotary_factor={factor} (must agree)")
        experts, groups = self.num_experts, self.n_group
        if experts % groups or experts < 2 * groups:
            problems.append(f"n_group={groups} (must divide num_experts={experts} into groups of 2 or more)")
        elif self.topk_group > groups:
            problems.append(f"topk_group={self.topk_group} (at most n_group={groups})")
        elif self.num_experts_per_tok > (eligible := experts // groups * self.topk_group):
            problems.append(
                f"num_experts_per_tok={self.num_experts_per_tok} (at most the {eligible} experts of topk_group groups)"
            )
        return problems

    def shape(self) -> TransformerShape:
        """A plain MLP in the first layers, then mixtures; half of each head is rotated."""
        shape = super().shape()
        factor = getattr(self, "partial_rotary_factor", None)
        rotated = getattr(self, "rotary_dim", None) if factor is None else int(shape.head_size * factor)
        mixture = Mixture(
            self.num_experts,
            self.num_experts_per_tok,
            self.moe_intermediate_size,
            scoring="sigmoid",
            renormalised=True,
            scale=self.routed_scaling_factor,
            bias=True,
            groups=self.n_group,
            groups_kept=self.topk_group,
            shared_width=self.moe_intermediate_size * self.num_shared_experts,
            router_in_fp32=True,
        )
        return replace(
            shape,
            qk_norm=True,
            rotary_dim=shape.head_size // 2 if rotated is None else rotated,
            mixture=mixture,
            dense_layers=self.first_k_dense_replace,
        )


class FastDLLMv2Config(BlockDiffusionConfig):
    """Fast-dLLM v2's config.json: Qwen2.5's keys (docs/models.md)."""

    model_type = "Fast_dLLM_Qwen"
    default_block_length: ClassVar[int] = 32
    default_threshold: ClassVar[float] = 0.9
    sub_block_length: ClassVar[int] = 8
    logit_shift: ClassVar[int] = 1
    other_vocabularies: ClassVar[tuple[int, ...]] = (151936,)  # of 1.5B
    defaults: ClassVar[dict[str, Any]] = {
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "mask_token_id": 151665,
        "eos_token_id": 151645,
        "tie_word_embeddings": False,
    }
    supported_values: ClassVar[dict[str, tuple[Any, ...]]] = {
        **BlockDiffusionConfig.supported_values,
        "use_mrope": (False,),
        "partial_rotary_factor": (1, None),
    }

    # transformers gives a subclass without an __init__ of its own a generated one.
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)

    def decoding_defaults(self) -> dict[str, Any]:
        """Tokens are committed in parts of a block."""
        block = self.traits().block_length
        assert block is not None
        window = self.sub_block_length if block % self.sub_block_length == 0 else 0
        return {**super().decoding_defaults(), "window": window}

    def shape(self) -> TransformerShape:
        """Biases on q, k and v alone."""
        return replace(super().shape(), qkv_bias=True)
