"""dLLM-Cache as the specification has it: all T rows in every layer, nothing saved.

docs/methods/d2cache.md, section 6.

LLM-Cache as the specification has it: all T rows in every layer, nothing saved.

docs/methods/d2cache.md, section 6.
"""

from __future__ import annotations

import torch

from tests.reference.dense import DenseModel


class DLLMCache:
    """One request's forward passes; attention and MLP outputs are kept apart, as published."""

    def __init__(self, model: DenseModel, prompt_len: int, kp: int, kr: int, rou: float) -> None:
        self.model, self.prompt_len = model, prompt_len
        self.kp, self.kr, self.rou = kp, kr, rou
        self.step = 0
        self.attention: dict[int, torch.Tensor] = {}
        self.mlp: dict[int, torch.Tensor] = {}
        self.refreshed: list[list[list[int]]] = []  # of each step and layer, the rows that were computed

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Final hidden states [T, d] of the whole text [T]."""
        model = self.model
        h = model.w["embed"][ids]
        self.refreshed.append([])
        for i in range(model.num_layers):
            x = model._norm(h, f"{i}.norm1")
            rows = self._rows(i, x)
            self.refreshed[-1].append(rows.tolist())
            h = h + self._attention(i, x, rows)
            h = h + self._mlp(i, h, rows)
        self.step += 1
        return model._norm(h, "norm")

    def _rows(self, layer: int, x: torch.Tensor) -> torch.Tensor:
        """The rows that a layer computes; renews the values of the canvas where it looks for changed ones."""
        model, prompt, total = self.model, self.prompt_len, len(x)
        due_prompt = layer == 0 or self.step % self.kp == 0
        due_canvas = layer == 0 or self.step % self.kr == 0
        rows = list(range(prompt)) if due_prompt else []
        if due_canvas:
            rows += range(prompt, total)
        elif self.rou > 0:
            new = model._linear(x[prompt:], f"{layer}.v")
            old = model.values[layer][prompt:].flatten(1)
            similarity = torch.cosine_similarity(new.double(), old.double(), dim=-1).tolist()
            model.values[layer][prompt:] = new.view(total - prompt, model.kv_heads, model.head_dim)
            order = sorted(range(total - prompt), key=lambda g: (similarity[g], g))
            rows += [prompt + g for g in order[: int((total - prompt) * self.rou)]]
        return torch.tensor(sorted(rows), dtype=torch.int64)

    def _attention(self, layer: int, x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """[T, d], new where ``rows`` are and old elsewhere."""
        model = self.model
        q = model._rope(model._linear(x[rows], f"{layer}.q").view(-1, model.heads, model.head_dim), rows)
        k = model._rope(model._linear(x[rows], f"{layer}.k").view(-1, model.kv_heads, model.head_dim), rows)
        model.keys[layer][rows] = k
        model.values[layer][rows] = model._linear(x[rows], f"{layer}.v").view(-1, model.kv_heads, model.head_dim)
        group = model.heads // model.kv_heads
        keys = model.keys[layer].repeat_interleave(group, 1)
        values = model.values[layer].repeat_interleave(group, 1)
        weights = (torch.einsum("qhd,thd->hqt", q, keys) * model.head_dim**-0.5).softmax(-1)
        out = torch.einsum("hqt,thd->qhd", weights, values).reshape(len(rows), model.width)
        self.attention.setdefault(layer, torch.zeros_like(x))[rows] = model._linear(out, f"{layer}.o")
        return self.attention[layer]

    def _mlp(self, layer: int, h: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """[T, d], new where ``rows`` are and old elsewhere."""
        model = self.model
        x = model._norm(h[rows], f"{layer}.norm2")
        gate = torch.nn.functional.silu(model._linear(x, f"{layer}.gate"))
        out = model._linear(gate * model._linear(x, f"{layer}.up"), f"{layer}.down")
        self.mlp.setdefault(layer, torch.zeros_like(h))[rows] = out
        return self.mlp[layer]
