"""Sizes and switches of a llama-type transformer: what all families' configurations say in different words."""

from __future__ import annotations

from dataclasses import dataclass

from vllm_d2cache.models.rope import RopeScaling


@dataclass(frozen=True)
class Mixture:
    """A mixture of experts in place of an MLP.

    Attributes:
        num_experts: experts a row is routed among.
        per_token: experts that answer a row: those of the highest scores.
        width: of one expert's MLP.
        scoring: how the router's logits become scores: ``softmax`` over all experts or ``sigmoid`` of each.
        renormalised: the scores of the chosen are divided by their sum before they become weights.
        scale: of the weights, afterwards.
        bias: the router has a number for each expert, float32, that is added to its score where experts are chosen, and
            not to its weight.
        groups: equal groups the experts are in. A row is routed within the ``groups_kept`` groups whose two best
            (biased) scores have the largest sum.
        shared_width: of an MLP that answers every row besides; 0 = there is none.
        router_in_fp32: the router's logits are computed in fp32 whatever the model's dtype.
    """

    num_experts: int
    per_token: int
    width: int
    scoring: str = "softmax"
    renormalised: bool = False
    scale: float = 1.0
    bias: bool = False
    groups: int = 1
    groups_kept: int = 1
    shared_width: int = 0
    router_in_fp32: bool = False


@dataclass(frozen=True)
class TransformerShape:
    """Everything models/common.py needs to build the network.

    Attributes:
        intermediate_size: of the plain MLPs; nobody reads it where all layers are mixtures.
        vocab_size: tokens that can be predicted.
        embedding_size: rows of the embedding and the head; those beyond ``vocab_size`` are padding.
        max_positions: positions the model was trained on.
        rope_in_fp32: rotate q and k in fp32 whatever the model's dtype.
        tied_head: the LM head is the embedding.
        qk_norm: an RMS norm over each head of q and k, before the rotation.
        head_dim: elements of one head; None = hidden_size / num_heads.
        rotary_dim: the first elements of a head, which are rotated; None = all.
        mixture: the MLP of all layers behind the ``dense_layers``; None = they have a plain one.
        rope_scaling: how more positions than those are rotated; None = there are no more.
        dense_layers: the first layers, whose MLP is a plain one.
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
    head_dim: int | None = None
    rotary_dim: int | None = None
    mixture: Mixture | None = None
    dense_layers: int = 0
    rope_scaling: RopeScaling | None = None

    @property
    def head_size(self) -> int:
        """Elements of one head."""
        return self.hidden_size // self.num_heads if self.head_dim is None else self.head_dim

    @property
    def longest(self) -> int:
        """Positions the rotary embedding is prepared for."""
        return self.max_positions if self.rope_scaling is None else self.rope_scaling.longest

    @property
    def q_size(self) -> int:
        """Rows of the q projection, and columns of the output projection."""
        return self.num_heads * self.head_size

    @property
    def kv_size(self) -> int:
        """Rows of the k or v projection."""
        return self.num_kv_heads * self.head_size

    def mixture_of(self, layer: int) -> Mixture | None:
        """The mixture of experts in layer ``layer``, or None where its MLP is a plain one."""
        return None if layer < self.dense_layers else self.mixture

    @property
    def mlp_width(self) -> int:
        """Elements of all MLPs that a row passes in a layer, of the widest layer."""
        kinds = {self.mixture_of(layer) for layer in range(self.num_layers)}
        return max(self.intermediate_size if m is None else m.per_token * m.width + m.shared_width for m in kinds)
