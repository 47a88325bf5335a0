"""A dense LLaDA with a scattered-row KV cache, written from d2cache.md alone: the oracle of the engine's model."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from vllm_d2cache.records import KeyChoice


class DenseLlada:
    """One request's forward passes: fresh rows attend to all T positions of the dense cache.

    Args:
        directory: a checkpoint in LLaDA's layout.
    """

    def __init__(self, directory: Path) -> None:
        self.config = json.loads((directory / "config.json").read_text())
        weights = load_file(directory / "model.safetensors")
        self.w = {k.removeprefix("model.transformer."): v.float() for k, v in weights.items()}
        self.heads = self.config["n_heads"]
        self.kv_heads = self.config["n_kv_heads"] or self.heads
        self.head_dim = self.config["d_model"] // self.heads
        self.keys: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []
        self.visible: torch.Tensor | None = None  # positions the next rows attend to; None = all
        self.choice: KeyChoice | None = None  # of the next rows, where layers differ in their keys
        self.kept: dict[int, list[int]] = {}  # layer -> positions it has chosen

    def reset(self, num_positions: int) -> None:
        """Forget the cache and make room for ``num_positions``."""
        shape = (num_positions, self.kv_heads, self.head_dim)
        self.keys = [torch.full(shape, torch.nan) for _ in range(self.config["n_layers"])]
        self.values = [torch.full(shape, torch.nan) for _ in range(self.config["n_layers"])]

    def forward(self, ids: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Final hidden states [n, d] of the rows, and each layer's head-averaged attention map [n, T]."""
        h = self.w["wte.weight"][ids]
        maps = []
        for i in range(self.config["n_layers"]):
            p = f"blocks.{i}."
            x = self._norm(h, p + "attn_norm.weight")
            q = self._rope((x @ self.w[p + "q_proj.weight"].T).view(-1, self.heads, self.head_dim), positions)
            k = self._rope((x @ self.w[p + "k_proj.weight"].T).view(-1, self.kv_heads, self.head_dim), positions)
            v = (x @ self.w[p + "v_proj.weight"].T).view(-1, self.kv_heads, self.head_dim)
            self.keys[i][positions], self.values[i][positions] = k, v
            group = self.heads // self.kv_heads
            seen = self._seen(i, q)
            keys = self.keys[i][seen].repeat_interleave(group, 1)
            values = self.values[i][seen].repeat_interleave(group, 1)
            weights = (torch.einsum("qhd,thd->hqt", q, keys) * self.head_dim**-0.5).softmax(-1)
            maps.append(weights.mean(0))
            out = torch.einsum("hqt,thd->qhd", weights, values).reshape(len(ids), -1)
            h = h + out @ self.w[p + "attn_out.weight"].T
            x = self._norm(h, p + "ff_norm.weight")
            gate = torch.nn.functional.silu(x @ self.w[p + "ff_proj.weight"].T)
            h = h + (gate * (x @ self.w[p + "up_proj.weight"].T)) @ self.w[p + "ff_out.weight"].T
        return self._norm(h, "ln_f.weight"), maps

    def _seen(self, layer: int, q: torch.Tensor) -> torch.Tensor | slice:
        """Positions the layer's rows attend to. rivals.md, section 2, in loops."""
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
        name = "wte.weight" if self.config["weight_tying"] else "ff_out.weight"
        return (hidden @ self.w[name].T)[:, : self.config["vocab_size"]]

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
