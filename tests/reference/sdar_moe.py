"""SDAR-MoE: SDAR with a mixture in every layer; all experts are computed for every row (docs/models.md)."""

from __future__ import annotations

import torch

from tests.reference.llada_moe import DenseLladaMoe
from tests.reference.sdar import DenseSdar


class DenseSdarMoe(DenseSdar):
    """A checkpoint in SDAR-MoE's layout."""

    @staticmethod
    def common_name(name: str) -> str:
        """LLaDA-MoE has the same names."""
        return DenseLladaMoe.common_name(name)

    def _mlp(self, x: torch.Tensor, layer: int) -> torch.Tensor:
        weight = self.route(self._linear(x, f"{layer}.router"))
        outputs = [self._gated(x, f"{layer}.{e}.") for e in range(self.config["num_experts"])]
        return (torch.stack(outputs, -1) * weight.unsqueeze(1)).sum(-1)

    def route(self, logits: torch.Tensor) -> torch.Tensor:
        """[n, experts] logits -> weights, 0 for experts that do not answer."""
        best = logits.softmax(-1).topk(self.config["num_experts_per_tok"], -1)
        shares = best.values / best.values.sum(-1, keepdim=True)
        return torch.zeros_like(logits).scatter_(1, best.indices, shares)
