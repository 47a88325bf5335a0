"""How far the hidden states of rows have moved since they were last remembered.

docs/methods/other-caches.md, section 9.
"""

from __future__ import annotations

import torch

# Keeps a state of zeros from being divided by; the published value.
_SMALLEST_NORM = 1e-6


def relative_change(new: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
    """[n] float32: mean distance of the elements of [n, d] rows, relative to the root mean square of the old ones."""
    new, old = new.float(), old.float()
    return (new - old).abs().mean(1) / (old.square().mean(1).sqrt() + _SMALLEST_NORM)


def at_most_one(change: torch.Tensor, request: torch.Tensor, num_requests: int) -> torch.Tensor:
    """[n] float32: changes of requests in which some row changed by more than 1, divided by the largest of them.

    Args:
        change: [n] float32.
        request: [n] int64, the request each row belongs to.
    """
    largest = change.new_ones(num_requests).scatter_reduce_(0, request, change, "amax")
    return change / largest[request]
