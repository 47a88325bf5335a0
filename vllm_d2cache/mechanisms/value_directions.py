"""The directions in which a layer's values vary most, to compare rows by a few numbers each.

docs/methods/other-caches.md, section 4.

With W = U S V^T the value projection, SPA-Cache compares the proxies S_r V_r^T x of a normed row x from step to step. U
is orthonormal: these are the first r components U_r^T W x of the row's values without their bias. The values are
computed anyway, and the old ones stand in the pages. So U_r is all that is kept, and no proxies.
"""

from __future__ import annotations

from typing import Protocol

import torch

from vllm_d2cache.ops.rollout import TensorParallel

# Highest rank of proxies that a request may ask for: each layer keeps so many directions.
MOST_DIRECTIONS = 256

# Squared singular values below this share of the largest are zero but for rounding.
_SMALLEST_SHARE = 1e-12


class Projects(Protocol):
    """A layer, for its value projection."""

    def value_projection(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Weight [kv heads * head size, d] and bias [kv heads * head size], float32, as used with rows of ``dtype``."""


class ValueDirections:
    """Of all layers, each found when the first request compares its rows there.

    Finding them takes the eigenvectors of a d x d matrix, once.

    Args:
        tensor_parallel: None on a single rank.
    """

    def __init__(self, tensor_parallel: TensorParallel | None = None) -> None:
        self.tensor_parallel = tensor_parallel
        self._known: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def components(self, number: int, layer: Projects, values: torch.Tensor) -> torch.Tensor:
        """Values [..., n, kv heads, head size] of layer ``number`` -> [..., n, k] float32, the leading ones first.

        They are sums over heads: ranks that hold different heads add them up.
        """
        if number not in self._known:
            self._known[number] = self._find(*layer.value_projection(values.dtype))
        directions, of_bias = self._known[number]
        return values.flatten(-2).float() @ directions - of_bias

    def _find(self, weight: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Left singular vectors [kv heads * head size, k] of this rank's heads, and the bias's components [k]."""
        own = weight.double()
        gram = own.t() @ own
        if self.tensor_parallel is not None:
            gram = self.tensor_parallel.all_reduce(gram.float()).double()
        square, right = torch.linalg.eigh(gram)
        square, right = square.flip(0)[:MOST_DIRECTIONS], right.flip(1)[:, :MOST_DIRECTIONS]
        scale = torch.where(square > _SMALLEST_SHARE * square[0], square.clamp(min=0).rsqrt(), 0)
        directions = (own @ right * scale).float()
        return directions, bias @ directions


def leading(components: torch.Tensor, rank: torch.Tensor) -> torch.Tensor:
    """[..., n, k] with zeros behind the first ``rank`` [n] of each row."""
    place = torch.arange(components.shape[-1], device=components.device)
    return components * (place < rank.unsqueeze(1))
