"""Sizes and switches of a llama-type transformer: what LLaDA's and Dream's configurations say in different words."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TransformerShape:
    """Everything models/common.py needs to build the network.

    Attributes:
        vocab_size: tokens that can be predicted.
        embedding_size: rows of the embedding and the head; those beyond ``vocab_size`` are padding.
        max_positions: positions the rotary embedding is prepared for.
        rope_in_fp32: rotate q and k in fp32 whatever the model's dtype.
        intermediate_size: of the MLP, or of one expert.
        tied_head: the LM head is the embedding.
        qk_norm: an RMS norm over each head of q and k, before the rotation.
        num_experts: experts of each layer's mixture; 0 = a plain MLP.
        experts_per_token: the most probable ones; their probabilities are not made to sum to one.
    """

    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    intermediate_size: int
    vocab_size: int
    embedding_size: int
    max_positions: int
    norm_eps: float
    rope_theta: float
    rope_in_fp32: bool = False
    qkv_bias: bool = False
    tied_head: bool = False
    qk_norm: bool = False
    num_experts: int = 0
    experts_per_token: int = 0

    @property
    def head_size(self) -> int:
        """Elements of one head."""
        return self.hidden_size // self.num_heads

    @property
    def kv_size(self) -> int:
        """Rows of the k or v projection."""
        return self.num_kv_heads * self.head_size
