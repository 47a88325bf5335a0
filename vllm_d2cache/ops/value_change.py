"""How much the values of rows have changed since they were last written to their pages, and which changed most."""

from __future__ import annotations

import torch

# Products of lengths below it count as zero, as in torch.cosine_similarity.
_SMALLEST_LENGTHS = 1e-8


def swap_values(kv_cache: torch.Tensor, value: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """Write fresh values to their pages, in place, and return those that were there.

    Args:
        kv_cache: [blocks, kv heads, block size, 2 * head size], keys first.
        value: [n, kv heads, head size].
        slots: [n] int64, block * block size + offset.

    Returns:
        [n, kv heads, head size].
    """
    block_size, head_size = kv_cache.shape[2], value.shape[2]
    pages = kv_cache.permute(0, 2, 1, 3)[..., head_size:]
    block = slots.div(block_size, rounding_mode="floor")
    offset = slots - block * block_size
    old = pages[block, offset]
    pages[block, offset] = value
    return old


def write_keys(kv_cache: torch.Tensor, key: torch.Tensor, slots: torch.Tensor) -> None:
    """Write fresh keys [n, kv heads, head size] to their pages, in place; arguments as above."""
    block_size, head_size = kv_cache.shape[2], key.shape[2]
    block = slots.div(block_size, rounding_mode="floor")
    kv_cache.permute(0, 2, 1, 3)[..., :head_size][block, slots - block * block_size] = key


def change_parts(new: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
    """[n, 3] float32: squared lengths of the difference of new and old values [n, ...], of the new and of the old.

    They are sums over heads: ranks that hold different heads add them up.
    """
    new, old = new.float().flatten(1), old.float().flatten(1)
    return torch.stack([(new - old).square().sum(1), new.square().sum(1), old.square().sum(1)], 1)


def cosine_distance(parts: torch.Tensor) -> torch.Tensor:
    """[n] float32, 1 - the cosine similarity, from the parts [n, 3] of the change; 1 where a length is next to zero.

    Not from the product: rows that hardly change have cosines that no float below 1 tells apart.
    """
    squared, new, old = parts.unbind(1)
    new, old = new.sqrt(), old.sqrt()
    lengths = new * old
    distance = (squared - (new - old).square()) / (2 * lengths.clamp(min=_SMALLEST_LENGTHS))
    return torch.where(lengths < _SMALLEST_LENGTHS, 1.0, distance)


def most_changed(distance: torch.Tensor, request: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """[n] bool: the ``count`` rows of each request with the largest distance. Ties go to the earlier row.

    Args:
        distance: [n] float32.
        request: [n] int64 ascending, the request each row belongs to.
        count: [R] int64, of each request.
    """
    by_distance = distance.argsort(descending=True, stable=True)
    order = by_distance[request[by_distance].argsort(stable=True)]  # by request, then by distance
    start = torch.searchsorted(request, torch.arange(count.shape[0], device=request.device))
    rank = torch.arange(request.shape[0], device=request.device) - start[request]
    return torch.zeros_like(request, dtype=torch.bool).scatter_(0, order, rank < count[request])
