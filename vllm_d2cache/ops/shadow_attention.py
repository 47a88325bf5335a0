"""Attention of shadow rows: masks in the place of text, to ask how probable that text is.

docs/methods/d2cache.md, section 4, WINO.

A shadow has the place of one position of its request's text. It attends to the keys of all other positions and to
those of all shadows of the request; nothing attends to a shadow but shadows, and its K and V are never cached.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vllm_d2cache.ops.paged_attention import PagedLayout, read_kv

# Rows whose visibility mask [rows, keys] exists at one time.
_ROWS_PER_TILE = 64


@dataclass(frozen=True)
class ShadowRows:
    """The shadows of a step, request by request; the same for all layers."""

    counts: list[int]  # of each request, 0 for most
    positions: torch.Tensor  # [S] int64, whose place each has


def shadow_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    kv_cache: torch.Tensor,
    layout: PagedLayout,
    shadows: ShadowRows,
    scale: float,
    output: torch.Tensor,
) -> None:
    """Attend from every shadow.

    Args:
        query: [S, heads, head size].
        key, value: [S, kv heads, head size], fresh.
        kv_cache: [blocks, kv heads, block size, 2 * head size], this step's text already written.
        scale: of the logits.
        output: [S, heads, head size], written.
    """
    end = 0
    for r, count in enumerate(shadows.counts):
        start, end = end, end + count
        if count == 0:
            continue
        text_key, text_value = read_kv(kv_cache, layout, r)
        length = text_key.shape[1]
        keys = torch.cat([text_key, key[start:end].transpose(0, 1)], 1).unsqueeze(0)
        values = torch.cat([text_value, value[start:end].transpose(0, 1)], 1).unsqueeze(0)
        gqa = query.shape[1] != key.shape[1]
        for i in range(start, end, _ROWS_PER_TILE):
            j = min(i + _ROWS_PER_TILE, end)
            visible = torch.ones(j - i, length + count, dtype=torch.bool, device=query.device)
            visible.scatter_(1, shadows.positions[i:j].unsqueeze(1), False)
            attended = torch.nn.functional.scaled_dot_product_attention(
                query[i:j].transpose(0, 1).unsqueeze(0), keys, values, attn_mask=visible, scale=scale, enable_gqa=gqa
            )
            output[i:j].copy_(attended[0].transpose(0, 1))
