"""The yardstick of step_speed.py: the same layers in bare PyTorch, dense keys and values, nothing around them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class Shape:
    """Sizes of a LLaDA-architecture model."""

    layers: int = 8
    width: int = 512
    heads: int = 8
    mlp: int = 1536
    vocab: int = 8192


class BareModel:
    """Random weights, fused projections, scaled_dot_product_attention."""

    def __init__(self, shape: Shape, max_positions: int, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)

        def weight(out_dim: int, in_dim: int) -> torch.Tensor:
            return torch.randn(out_dim, in_dim, generator=generator) * 0.02

        d, m = shape.width, shape.mlp
        self.shape = shape
        self.embedding = weight(shape.vocab, d)
        self.head = weight(shape.vocab, d)
        self.norm = torch.ones(d)
        self.blocks = [(weight(3 * d, d), weight(d, d), weight(2 * m, d), weight(d, m)) for _ in range(shape.layers)]
        head_dim = d // shape.heads
        size = (shape.heads, max_positions, head_dim)
        self.keys = [torch.randn(size, generator=generator) for _ in self.blocks]
        self.values = [torch.randn(size, generator=generator) for _ in self.blocks]
        self.scratch = torch.empty(0)
        half = head_dim // 2
        angle = torch.arange(max_positions).unsqueeze(1) / 500000.0 ** (torch.arange(half) / half)
        self.cos, self.sin = torch.cat([angle.cos()] * 2, 1), torch.cat([angle.sin()] * 2, 1)

    @torch.inference_mode()
    def forward(
        self,
        ids: torch.Tensor,
        positions: torch.Tensor,
        length: int,
        logits_rows: torch.Tensor,
        maps: bool = False,
    ) -> torch.Tensor:
        """Refresh ``positions`` [n] against ``length`` keys; logits [m, vocab] of ``logits_rows`` [m].

        With ``maps``, each layer also leaves its head-averaged attention map [n, length], as d2Cache needs: attention
        is then written out, as no fused kernel returns it.
        """
        shape = self.shape
        hidden = self.embedding[ids]
        cos, sin = self.cos[positions], self.sin[positions]
        for (qkv_w, out_w, up_w, down_w), keys, values in zip(self.blocks, self.keys, self.values, strict=True):
            x = F.rms_norm(hidden, (shape.width,), self.norm, 1e-5)
            q, k, v = F.linear(x, qkv_w).view(len(ids), 3, shape.heads, -1).permute(1, 2, 0, 3)
            q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
            keys[:, positions], values[:, positions] = k, v
            if maps:
                weights = self._scratch(shape.heads, len(ids), length)
                torch.matmul(q * q.shape[-1] ** -0.5, keys[:, :length].mT, out=weights)
                torch.softmax(weights, -1, out=weights)
                weights.mean(0)
                out = weights @ values[:, :length]
            else:
                out = F.scaled_dot_product_attention(q[None], keys[None, :, :length], values[None, :, :length])[0]
            hidden = hidden + F.linear(out.transpose(0, 1).reshape(len(ids), -1), out_w)
            gate, up = F.linear(F.rms_norm(hidden, (shape.width,), self.norm, 1e-5), up_w).chunk(2, -1)
            hidden = hidden + F.linear(F.silu(gate) * up, down_w)
        return F.linear(F.rms_norm(hidden[logits_rows], (shape.width,), self.norm, 1e-5), self.head)

    def _scratch(self, *shape: int) -> torch.Tensor:
        """Memory for attention weights, kept between calls: fresh pages would cost more than the arithmetic."""
        size = math.prod(shape)
        if self.scratch.numel() < size:
            self.scratch = torch.empty(size)
        return self.scratch[:size].view(shape)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat([-b, a], -1) * sin
