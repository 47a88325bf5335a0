"""Attention rollout as a backward vector chain: importance of every position without a T x T matrix.

d2cache.md, sections 3.4 and 12. With W_l the row-normalised (attention + identity) matrix of layer l, the importance
c_j = sum_i (W_L ... W_1)_ij is the row vector of ones pushed through the layers from the last to the first; a
position that was not refreshed has the identity row and keeps its share.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

# Receives u [n] and adds sum_i u_i * Abar[i, :] to v [T] in place; one for each layer, last layer first.
PushBack = Callable[[torch.Tensor, torch.Tensor], None]


def rollout(layers: Iterable[PushBack], rows: torch.Tensor, num_positions: int) -> torch.Tensor:
    """Importance of each position of one request.

    Args:
        layers: from the last layer to the first, the product of a weight vector with that layer's head-averaged
            attention map Abar [n, T], whose rows sum to one.
        rows: [n] int64, the refreshed position behind each row of the map.
        num_positions: T.

    Returns:
        [T] float32; sums to T.
    """
    v = torch.ones(num_positions, dtype=torch.float32, device=rows.device)
    for push_back in layers:
        # Rows of Abar sum to one, so normalising Abar + I halves both.
        u = v[rows] * 0.5
        v[rows] = u
        push_back(u, v)
    return v


def push_back_map(attention_map: torch.Tensor) -> PushBack:
    """A layer given by its stored map Abar [n, T] float32."""

    def push_back(u: torch.Tensor, v: torch.Tensor) -> None:
        v.addmv_(attention_map.t(), u)

    return push_back


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
