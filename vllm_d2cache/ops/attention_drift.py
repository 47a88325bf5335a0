"""What positions receive of some rows' attention, without their map: the whole of it, and the share of one position."""

from __future__ import annotations

import torch

# Probabilities that exist at one time: [heads, tile rows, T].
_TILE_ELEMENTS = 1 << 21


def received_attention(query: torch.Tensor, key: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum over rows of the head-averaged attention to each position.

    Args:
        query: [n, heads, head size].
        key: [kv heads, T, head size].
        scale: of the logits.

    Returns:
        [T] float32, and [n, heads] float32: the log-sum-exp of each row's scaled logits.
    """
    n, heads, length = query.shape[0], query.shape[1], key.shape[1]
    total = query.new_zeros(length, dtype=torch.float32)
    normalisers = [query.new_zeros(0, heads, dtype=torch.float32)]
    key_t = key.float().transpose(1, 2)
    for rows in query.split(max(1, _TILE_ELEMENTS // (heads * length))) if n else ():
        logits = torch.bmm(_by_kv_head(rows, key.shape[0]), key_t).view(heads, len(rows), length) * scale
        normaliser = logits.logsumexp(2, keepdim=True)
        total += (logits - normaliser).exp_().sum((0, 1))
        normalisers.append(normaliser.squeeze(2).t())
    return total / heads, torch.cat(normalisers)


def attention_to(
    query: torch.Tensor, key: torch.Tensor, scale: float, normaliser: torch.Tensor, position: torch.Tensor
) -> torch.Tensor:
    """The head-averaged attention of each row to one position.

    Args:
        query, key, scale: as in ``received_attention``.
        normaliser: [n, heads] float32, its second result.
        position: [] int64.

    Returns:
        [n] float32.
    """
    one = key.index_select(1, position.view(1)).float().transpose(1, 2)  # [kv heads, head size, 1]
    logits = torch.bmm(_by_kv_head(query, key.shape[0]), one).view(query.shape[1], -1) * scale
    return (logits.t() - normaliser).exp().mean(1)


def shared_similarity(new: torch.Tensor, old: torch.Tensor, shared: torch.Tensor) -> torch.Tensor:
    """[] float32: the smallest cosine similarity of any layer; 0 where fewer than two positions are shared.

    One number points nowhere: its cosine would be 1 whatever has happened to it.

    Args:
        new, old: [layers, T] float32.
        shared: [T] bool, the positions that are compared.
    """
    similarity = torch.cosine_similarity(new * shared, old * shared, dim=1).amin()
    return torch.where(shared.sum() >= 2, similarity, 0.0)


def _by_kv_head(query: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """[n, heads, head size] -> [kv heads, group * n, head size] float32, the heads of a group one after the other."""
    return query.float().transpose(0, 1).reshape(kv_heads, -1, query.shape[2])
