"""A dense llama-type transformer with a scattered-row KV cache, written from docs/methods/d2cache.md alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from vllm_d2cache.mechanisms.hidden_keys import KeyChoice


class DenseModel:
    """One request's forward passes: fresh rows attend to all T positions of the dense cache.

    Subclasses give the weights and sizes of their family's checkpoints common names.

    Args:
        directory: a checkpoint in the family's layout.
    """

    logit_shift = 0
    keys_of_config: tuple[str, str, str, str, str]
    """config.json's words for heads, KV heads, width, layers and whether the head is tied."""

    def __init__(self, directory: Path) -> None:
        self.config: dict[str, Any] = json.loads((directory / "config.json").read_text())
        heads, kv_heads, width, layers, tied = (self.config[key] for key in self.keys_of_config)
        self.heads, self.kv_heads, self.width = heads, kv_heads or heads, width
        self.num_layers, self.tied = layers, tied
        weights = {k: v.float() for k, v in load_file(directory / "model.safetensors").items()}
        self.w = {self.common_name(k): v for k, v in weights.items()}
        self.head_dim = self.width // self.heads
        self.keys: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []
        self.visible: torch.Tensor | None = None  # positions the next rows attend to; None = all
        self.choice: KeyChoice | None = None  # of the next rows, where layers differ in their keys
        self.kept: dict[int, list[int]] = {}  # layer -> positions it has chosen

    @staticmethod
    def common_name(name: str) -> str:
        """embed, head, norm, or i.{norm1, q, k, v, qnorm, knorm, o, norm2, gate, up, down}; ``.bias`` behind it."""
        raise NotImplementedError

    def reset(self, num_positions: int) -> None:
        """Forget the cache and make room for ``num_positions``."""
        shape = (num_positions, self.kv_heads, self.head_dim)
        self.keys = [torch.full(shape, torch.nan) for _ in range(self.num_layers)]
        self.values = [torch.full(shape, torch.nan) for _ in range(self.num_layers)]

    def forward(self, ids: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Final hidden states [n, d] of the rows, and each layer's head-averaged attention map [n, T]."""
        h = self.w["embed"][ids]
        maps = []
        for i in range(self.num_layers):
            h, attention = self.layer(i, h, positions)
            maps.append(attention)
        return self._norm(h, "norm"), maps

    def layer(self, i: int, h: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Layer ``i``: hidden states [n, d] of the rows -> the same behind it, and the attention map."""
        x = self._norm(h, f"{i}.norm1")
        q = self._linear(x, f"{i}.q").view(-1, self.heads, self.head_dim)
        k = self._linear(x, f"{i}.k").view(-1, self.kv_heads, self.head_dim)
        if f"{i}.qnorm" in self.w:
            q, k = self._norm(q, f"{i}.qnorm"), self._norm(k, f"{i}.knorm")
        q, k = self._rope(q, positions), self._rope(k, positions)
        v = self._linear(x, f"{i}.v").view(-1, self.kv_heads, self.head_dim)
        self.keys[i][positions], self.values[i][positions] = k, v
        group = self.heads // self.kv_heads
        seen = self._seen(i, q)
        keys = self.keys[i][seen].repeat_interleave(group, 1)
        values = self.values[i][seen].repeat_interleave(group, 1)
        weights = (torch.einsum("qhd,thd->hqt", q, keys) * self.head_dim**-0.5).softmax(-1)
        out = torch.einsum("hqt,thd->qhd", weights, values).reshape(len(h), -1)
        h = h + self._linear(out, f"{i}.o")
        x = self._norm(h, f"{i}.norm2")
        return h + self._mlp(x, i), weights.mean(0)

    def _seen(self, layer: int, q: torch.Tensor) -> torch.Tensor | slice:
        """Positions the layer's rows attend to. docs/methods/other-caches.md, section 2, in loops."""
        if self.choice is None:
            return slice(None) if self.visible is None else self.visible
        always = self.choice.visible.tolist()
        if not self.choice.choose:
            return torch.tensor(sorted(always + self.kept[layer]))
        group = self.heads // self.kv_heads
        outside = [j for j in range(len(self.keys[layer])) if j not in always]
        mean = q[self.choice.queries].mean(0)
        score = [
            float(sum(mean[h] @ self.keys[layer][j, h // group] for h in range(self.heads)) / self.heads)
            for j in outside
        ]
        left, right = (self.choice.pool - 1) // 2, self.choice.pool // 2
        best = [max(score[max(0, n - left) : n + right + 1]) for n in range(len(score))]
        order = sorted(range(len(outside)), key=lambda n: (-best[n], n))
        self.kept[layer] = [outside[n] for n in order[: self.choice.count]]
        return slice(None)

    def lm_head(self, hidden: torch.Tensor) -> torch.Tensor:
        """[n, d] -> [n, vocab] logits."""
        return (hidden @ self.w["embed" if self.tied else "head"].T)[:, : self.config["vocab_size"]]

    def _mlp(self, x: torch.Tensor, layer: int) -> torch.Tensor:
        return self._gated(x, f"{layer}.")

    def _gated(self, x: torch.Tensor, prefix: str) -> torch.Tensor:
        gate = torch.nn.functional.silu(self._linear(x, f"{prefix}gate"))
        return self._linear(gate * self._linear(x, f"{prefix}up"), f"{prefix}down")

    def _linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return x @ self.w[name].T + self.w.get(f"{name}.bias", torch.zeros(()))

    def _norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.config["rms_norm_eps"])
        return x * scale * self.w[name]

    def _rope(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        half = self.head_dim // 2
        inv = 1.0 / self.config["rope_theta"] ** (torch.arange(half).float() / half)
        angle = positions.float().unsqueeze(1) * inv
        cos, sin = angle.cos().unsqueeze(1), angle.sin().unsqueeze(1)
        a, b = x[..., :half], x[..., half:]
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
