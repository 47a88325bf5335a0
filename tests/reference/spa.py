"""SPA-Cache as the specification has it: with proxies, all rows in all layers, nothing saved.

docs/methods/other-caches.md, section 4.

PA-Cache as the specification has it (docs/methods/other-caches.md, section 4): with proxies, all rows in all layers,
nothing saved.
"""

from __future__ import annotations

import math

import torch

from tests.reference.dense import DenseModel
from tests.reference.dllm import DLLMCache

# Published: depth of the peak, then budgets at the first layer, at the peak and at the end.
BUDGETS = {"llada": (0.75, 0.03, 0.25, 0.13), "dream": (0.5, 0.05, 0.3, 0.25)}


def budget(family: str, layer: int, num_layers: int, largest: float) -> float:
    """Share of the canvas that a layer computes, as two Gaussians with widths of their own."""
    peak, first, top, last = (x if n == 0 else x * largest / BUDGETS[family][2] for n, x in enumerate(BUDGETS[family]))
    depth = layer / num_layers
    if depth < peak:
        width = math.sqrt(-(peak**2) / (2 * math.log(first / top)))
        return max(2**-5, top * math.exp(-((depth - peak) ** 2) / (2 * width**2)))
    width = math.sqrt(-((1 - peak) ** 2) / (2 * math.log(last / top)))
    return top * math.exp(-((depth - peak) ** 2) / (2 * width**2))


class SPACache(DLLMCache):
    """One request's forward passes."""

    def __init__(
        self,
        model: DenseModel,
        prompt_len: int,
        refresh_steps: int,
        refresh_gen_steps: int,
        n_warmup_steps: int,
        max_update_ratio: float,
        update_ratio_dist: str,
        proxy_rank: int,
    ) -> None:
        super().__init__(model, prompt_len, 0, 0, 0.0)
        self.periods, self.warmup = (refresh_steps, refresh_gen_steps), n_warmup_steps
        self.largest, self.uniform = max_update_ratio, update_ratio_dist == "uniform"
        self.matrices = []
        for layer in range(model.num_layers):
            _, scale, right = torch.linalg.svd(model.w[f"{layer}.v"].double(), full_matrices=False)
            self.matrices.append((scale[:proxy_rank, None] * right[:proxy_rank]).float())
        self.proxies: dict[int, torch.Tensor] = {}

    def _rows(self, layer: int, x: torch.Tensor) -> torch.Tensor:
        model, prompt, total = self.model, self.prompt_len, len(x)
        everything = self.step % self.periods[0] == 0 or self.step <= self.warmup
        proxy = x[prompt:] @ self.matrices[layer].T
        old = self.proxies.get(layer)
        self.proxies[layer] = proxy
        if layer == 0 or everything:
            return torch.arange(total)
        canvas = torch.arange(prompt, total)
        if self.step % self.periods[1] == 0:
            return canvas
        keys = model._linear(x[prompt:], f"{layer}.k").view(-1, model.kv_heads, model.head_dim)
        values = model._linear(x[prompt:], f"{layer}.v").view(-1, model.kv_heads, model.head_dim)
        model.keys[layer][prompt:], model.values[layer][prompt:] = model._rope(keys, canvas), values
        assert old is not None
        # In fp64: rows that hardly change have cosines next to 1.
        similarity = torch.cosine_similarity(proxy.double(), old.double(), dim=-1).tolist()
        family = "dream" if model.logit_shift else "llada"
        share = self.largest if self.uniform else budget(family, layer, model.num_layers, self.largest)
        order = sorted(range(total - prompt), key=lambda g: (similarity[g], g))
        return torch.tensor(sorted(prompt + g for g in order[: int((total - prompt) * share)]), dtype=torch.int64)
