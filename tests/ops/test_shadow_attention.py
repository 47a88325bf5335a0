"""Shadow attention against scalar loops."""

from __future__ import annotations

import pytest
import torch

from vllm_d2cache.ops.paged_attention import PagedLayout, write_kv
from vllm_d2cache.ops.shadow_attention import ShadowRows, shadow_attention


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2)])
@pytest.mark.parametrize("consecutive", [True, False])
def test_each_shadow_sees_all_but_its_own_place(heads: int, kv_heads: int, consecutive: bool) -> None:
    size, block, lengths, counts = 8, 4, [11, 5, 90], [3, 0, 70]
    blocks = [-(-n // block) for n in lengths]
    order = torch.arange(sum(blocks)) if consecutive else torch.randperm(sum(blocks))
    table = torch.zeros(3, max(blocks), dtype=torch.int32)
    first, slots, used = [], [], 0
    for r, n in enumerate(blocks):
        own = order[used : used + n]
        used += n
        table[r, :n] = own.int()
        first.append(int(own[0]) if consecutive else -1)
        position = torch.arange(lengths[r])
        slots.append(own[position // block] * block + position % block)
    layout = PagedLayout(lengths, lengths, table, first, torch.cat(slots))
    cache = torch.zeros(sum(blocks), kv_heads, block, 2 * size)
    text_key, text_value = torch.randn(2, sum(lengths), kv_heads, size)
    write_kv(cache, text_key, text_value, layout.slots)

    total = sum(counts)
    query, key, value = (
        torch.randn(total, heads, size),
        torch.randn(total, kv_heads, size),
        torch.randn(total, kv_heads, size),
    )
    positions = torch.cat([torch.arange(4, 7), torch.arange(20, 90)])
    output = torch.full((total, heads, size), torch.nan)
    shadow_attention(query, key, value, cache, layout, ShadowRows(counts, positions), 0.3, output)

    begin, start = 0, 0
    for r, count in enumerate(counts):
        keys = torch.cat([text_key[begin : begin + lengths[r]], key[start : start + count]])
        values = torch.cat([text_value[begin : begin + lengths[r]], value[start : start + count]])
        for s in range(start, start + count):
            seen = [j for j in range(len(keys)) if j != int(positions[s])]
            for h in range(heads):
                group = h * kv_heads // heads
                weights = torch.softmax(0.3 * keys[seen, group] @ query[s, h], 0)
                torch.testing.assert_close(output[s, h], weights @ values[seen, group], rtol=1e-4, atol=1e-5)
        begin, start = begin + lengths[r], start + count
