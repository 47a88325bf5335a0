"""Bidirectional attention of scattered query rows over paged K and V, in PyTorch: the CPU path and the specification.

Three things a refresh needs: the output of the rows, the head-averaged probability map of the rows (for the
attention rollout), and the same map's product with a vector without ever holding the map (for steps in which so many
rows are refreshed that the map would be a T x T matrix).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

# Probabilities that exist at one time while a map is taken: [heads, tile rows, T]. Sized to stay in a core's cache.
_TILE_ELEMENTS = 1 << 20


@dataclass(frozen=True)
class PagedLayout:
    """Where each request's keys and values lie; the same for all layers. Built once a step."""

    counts: list[int]  # query rows of each request, in order
    lengths: list[int]  # T of each request
    block_table: torch.Tensor  # [R, blocks] int, KV block ids
    first_block: list[int]  # id of a request's first block if its blocks are consecutive, else -1
    slots: torch.Tensor  # [N] int64, flat KV slot of each query row; -1 for a padding row


def write_kv(kv_cache: torch.Tensor, key: torch.Tensor, value: torch.Tensor, slots: torch.Tensor) -> None:
    """Scatter fresh keys and values into their pages, in place.

    Args:
        kv_cache: [blocks, kv heads, block size, 2 * head size], keys first.
        key, value: [N, kv heads, head size].
        slots: [N] int64, block * block size + offset; rows with -1 are not written.
    """
    block_size, head_size = kv_cache.shape[2], key.shape[2]
    pages = kv_cache.permute(0, 2, 1, 3)
    block = slots.div(block_size, rounding_mode="floor")
    offset = slots - block * block_size
    if slots.device.type != "cpu":
        # Padding rows go to the null block, which no request owns; on CPU there are none.
        offset = torch.where(slots < 0, 0, offset)
        block = block.clamp(min=0)
    pages[..., :head_size][block, offset] = key
    pages[..., head_size:][block, offset] = value


def read_kv(kv_cache: torch.Tensor, layout: PagedLayout, r: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values [kv heads, T, head size] of one request; views if its blocks are consecutive, else copies."""
    block_size, head_size = kv_cache.shape[2], kv_cache.shape[3] // 2
    length = layout.lengths[r]
    num_blocks = -(-length // block_size)
    start = layout.first_block[r]
    blocks = slice(start, start + num_blocks) if start >= 0 else layout.block_table[r, :num_blocks].long()
    pages = kv_cache[blocks]
    heads = pages.shape[1]
    text = pages.transpose(0, 1).reshape(heads, num_blocks * block_size, 2 * head_size)[:, :length]
    return text[..., :head_size], text[..., head_size:]


def paged_attention(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    layout: PagedLayout,
    scale: float,
    output: torch.Tensor,
    maps: list[torch.Tensor | None],
) -> None:
    """Attend from every query row to all T positions of its request.

    Args:
        query: [N, heads, head size].
        kv_cache: [blocks, kv heads, block size, 2 * head size].
        scale: of the logits.
        output: [N, heads, head size], written.
        maps: one for each request: float32 [rows, T], written with the mean probability over heads, or None.
    """
    offset = 0
    for r, count in enumerate(layout.counts):
        rows = slice(offset, offset + count)
        offset += count
        if count == 0:
            continue
        key, value = read_kv(kv_cache, layout, r)
        q = query[rows].transpose(0, 1)  # [heads, n, D]
        destination = output[rows].transpose(0, 1)
        target = maps[r]
        if target is None:
            gqa = q.shape[0] != key.shape[0]
            attended = torch.nn.functional.scaled_dot_product_attention(
                q.unsqueeze(0), key.unsqueeze(0), value.unsqueeze(0), scale=scale, enable_gqa=gqa
            )
            destination.copy_(attended[0])
            continue
        for i, j, probs in _probability_tiles(q, key, scale):
            torch.mean(probs.flatten(0, 1) if probs.dim() == 4 else probs, dim=0, out=target[i:j])
            attended = torch.matmul(probs.to(value.dtype), value.unsqueeze(1) if probs.dim() == 4 else value)
            destination[:, i:j].copy_(attended.flatten(0, -3))


def attention_map_product(
    query: torch.Tensor, key: torch.Tensor, scale: float, weights: torch.Tensor, accumulator: torch.Tensor
) -> None:
    """Add weights^T times the head-averaged map to ``accumulator``, a tile of rows at a time.

    Args:
        query: [n, heads, head size].
        key: [kv heads, T, head size].
        weights: [n] float32.
        accumulator: [T] float32, changed in place.
    """
    num_heads = query.shape[1]
    for i, j, probs in _probability_tiles(query.transpose(0, 1), key, scale):
        u = (weights[i:j] / num_heads).repeat(num_heads)
        accumulator.addmv_(probs.reshape(-1, probs.shape[-1]).t(), u)


def _probability_tiles(q: torch.Tensor, key: torch.Tensor, scale: float):
    """Yield (i, j, probabilities of rows i to j): [heads, m, T], or [kv heads, group, m, T] with grouped queries.

    The buffer is reused: a tile is valid until the next one.
    """
    heads, count, head_size = q.shape
    kv_heads, length, _ = key.shape
    tile = max(1, min(count, _TILE_ELEMENTS // (heads * length)))
    key_t = key.transpose(1, 2)
    for i in range(0, count, tile):
        j = min(i + tile, count)
        part = q[:, i:j] * scale
        if heads == kv_heads:
            logits = torch.bmm(part, key_t)
        else:
            logits = torch.matmul(part.reshape(kv_heads, -1, head_size), key_t)
            logits = logits.view(kv_heads, heads // kv_heads, j - i, length)
        yield i, j, torch.softmax(logits, dim=-1, dtype=torch.float32)
