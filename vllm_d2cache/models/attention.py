"""Self-attention in vLLM's layers: projections, rotation, and what goes into the pages."""

from __future__ import annotations

import torch
from torch import nn
from vllm.config import CacheConfig
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import QKVParallelLinear, RowParallelLinear
from vllm.model_executor.layers.quantization import QuantizationConfig
from vllm.model_executor.layers.rotary_embedding import get_rope

from vllm_d2cache.engine.attention_backend import (
    D2CacheAttentionBackend,
    rotate_into_pages,
    rows_in_pages,
    write_into_pages,
)
from vllm_d2cache.models.shape import TransformerShape

# Unit vectors that are projected at one time.
_UNITS_AT_ONCE = 256


class SelfAttention(nn.Module):
    """Self-attention over all positions."""

    def __init__(
        self,
        shape: TransformerShape,
        cache_config: CacheConfig,
        quant_config: QuantizationConfig | None,
        prefix: str,
    ) -> None:
        super().__init__()
        head_size, world = shape.head_size, get_tensor_model_parallel_world_size()
        self.qkv_proj = QKVParallelLinear(
            shape.hidden_size,
            head_size,
            shape.num_heads,
            shape.num_kv_heads,
            bias=shape.qkv_bias,
            quant_config=quant_config,
            prefix=f"{prefix}.qkv_proj",
        )
        self.o_proj = RowParallelLinear(
            shape.q_size, shape.hidden_size, bias=False, quant_config=quant_config, prefix=f"{prefix}.o_proj"
        )
        num_heads = shape.num_heads // world
        num_kv_heads = max(1, shape.num_kv_heads // world)
        self.sizes = [num_heads * head_size, num_kv_heads * head_size, num_kv_heads * head_size]
        self.q_norm = RMSNorm(head_size, eps=shape.norm_eps) if shape.qk_norm else None
        self.k_norm = RMSNorm(head_size, eps=shape.norm_eps) if shape.qk_norm else None
        self.rope_in_fp32 = shape.rope_in_fp32
        rotary_dim = head_size if shape.rotary_dim is None else shape.rotary_dim
        positions, scaled = shape.max_positions, {"rope_type": "default"}
        if shape.rope_scaling is not None:
            positions, scaled = shape.rope_scaling.for_vllm()
        self.rotary_emb = get_rope(
            head_size,
            max_position=positions,
            rope_parameters={
                **scaled,
                "rope_theta": shape.rope_theta,
                "partial_rotary_factor": rotary_dim / head_size,
            },
            is_neox_style=True,
            dtype=torch.float32 if shape.rope_in_fp32 else None,
        )
        assert self.rotary_emb.rotary_dim == rotary_dim  # vLLM rounds the product of both
        self.attn = Attention(
            num_heads,
            head_size,
            head_size**-0.5,
            num_kv_heads=num_kv_heads,
            cache_config=cache_config,
            quant_config=quant_config,
            prefix=f"{prefix}.attn",
            attn_backend=D2CacheAttentionBackend,
        )

    def forward(self, positions: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """[N, d] -> [N, d]."""
        q, k, v = self._project(hidden)
        if not rotate_into_pages(self.attn, self.rotary_emb, positions, q, k, v):
            q, k = self._rotate(positions, q, k)
        out, _ = self.o_proj(self.attn(q, k, v))
        return out

    def store(
        self, positions: torch.Tensor, hidden: torch.Tensor, first: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Put keys and values of normed rows [n, d], the step's from row ``first`` on, into their pages.

        Returns:
            Queries [n, heads * head size], and keys and values of those of the rows that have no page.
        """
        q, k, v = self._project(hidden)
        if not rotate_into_pages(self.attn, self.rotary_emb, positions, q, k, v, first):
            q, k = self._rotate(positions, q, k)
            write_into_pages(self.attn, k, v, first)
        behind = rows_in_pages(self.attn, first, len(q))
        # Copies, as all that was projected would stay with a view.
        return q, k[behind:].clone(), v[behind:].clone()

    def _project(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys and values [N, heads * head size], not yet rotated."""
        qkv, _ = self.qkv_proj(hidden)
        q, k, v = qkv.split(self.sizes, dim=-1)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = _each_head(self.q_norm, q), _each_head(self.k_norm, k)
        return q, k, v

    def _rotate(self, positions: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries and keys by their positions; ``q`` and ``k`` may be overwritten."""
        if self.rope_in_fp32 and q.dtype != torch.float32:
            q32, k32 = self.rotary_emb(positions, q.float(), k.float())
            return q32.to(q.dtype), k32.to(k.dtype)
        q, k = self.rotary_emb(positions, q, k)
        return q, k

    def keys_and_values(self, positions: torch.Tensor, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[n, d] normed rows -> two of [n, kv heads, head size], as attention writes them to the cache."""
        query, key, value = self._project(hidden)
        _, key = self._rotate(positions, query, key)
        shape = (len(hidden), -1, self.attn.head_size)
        return key.reshape(shape), value.reshape(shape)

    def value_projection(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Weight [kv heads * head size, d] and bias, float32 (value_directions.Projects).

        The weight is what the projection makes of unit vectors: it does not matter how it is packed or quantised.
        """
        projection, size = self.qkv_proj, self.sizes[2]
        units = torch.eye(projection.input_size, dtype=dtype, device=self.attn.kv_cache.device)
        parts = [projection.quant_method.apply(projection, rows, None) for rows in units.split(_UNITS_AT_ONCE)]
        weight = torch.cat([part[:, -size:].float() for part in parts]).t()
        return weight, weight.new_zeros(size) if projection.bias is None else projection.bias[-size:].float()

    def values(self, hidden: torch.Tensor) -> torch.Tensor:
        """[n, d] normed rows -> [n, kv heads, head size]."""
        # The joint projection, as its weights may be packed or quantised: they are not for others to cut.
        value = self.qkv_proj(hidden)[0].split(self.sizes, dim=-1)[2]
        return value.reshape(len(hidden), -1, self.attn.head_size)


def _each_head(norm: RMSNorm, x: torch.Tensor) -> torch.Tensor:
    """``norm`` over each head of [N, heads * head size]."""
    return norm(x.reshape(-1, norm.weight.shape[0])).view(x.shape)
