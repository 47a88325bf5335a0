"""Attention rollout by its definition: an oracle."""

from __future__ import annotations

import torch


def rollout_dense(attention_maps: list[torch.Tensor], rows: torch.Tensor) -> torch.Tensor:
    """The definition, with the full matrix product, first layer first. An oracle for tests: O(L T^3)."""
    num_positions = attention_maps[0].shape[1]
    product = torch.eye(num_positions, dtype=torch.float64)
    for attention_map in attention_maps:
        w = torch.eye(num_positions, dtype=torch.float64)
        w[rows] += attention_map.double()
        w = w / w.sum(1, keepdim=True)
        product = w @ product
    return product.sum(0)
