"""Paged bidirectional attention of scattered query rows, with log-sum-exp and head-averaged maps.

Two launches a layer: the output with the log-sum-exp of every row and head, keys in tiles with a running maximum; then,
where maps are wanted, one tile of the map at a time, adding up softmax(q k^T) over the heads. Nothing of the size
[heads, rows, T] exists. Tile sizes go by the model's shape alone, never by the batch, so that a request's numbers do
not depend on its mates.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from vllm_d2cache.ops.paged_attention import AttentionMaps, PagedLayout
from vllm_d2cache.ops.triton.common import dot_type, find_request, num_tiles, tile_shape

_LOG2_E = math.log2(math.e)


@triton.jit(do_not_specialize=["num_requests"])
def _attention_kernel(
    query,  # [N, heads, HEAD]
    output,  # [N, heads, HEAD]
    lse,  # [N, heads] float32, base 2
    kv_cache,  # [blocks, kv heads, BLOCK_SIZE, 2 * HEAD]
    block_table,  # [R, blocks] int32
    row_starts,  # [R + 1] int32
    num_keys,  # [R] int32
    slots,  # [N] int64, -1 = padding row
    key_positions,  # flat int32
    key_starts,  # [R] int64 into key_positions, -1 = key j is position j
    limits,  # [N] int32, a row attends to positions before this one
    num_requests,
    scale,  # times log2(e)
    stride_qn,
    stride_qh,
    stride_on,
    stride_oh,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_table,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,  # query heads of a kv head
    HEAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,  # (row, query head) pairs of a tile
    BLOCK_N: tl.constexpr,  # keys of a tile
    BLOCK_D: tl.constexpr,  # HEAD rounded up
    DOT: tl.constexpr,
    WRITE_OUTPUT: tl.constexpr,  # False: log-sum-exp alone
    HAS_KEYS: tl.constexpr,  # some request attends to a part of its positions
    HAS_LIMITS: tl.constexpr,  # rows end at different keys; not with HAS_KEYS
):
    rows_per_tile: tl.constexpr = BLOCK_M // GROUP
    kv_head = tl.program_id(1).to(tl.int64)  # a head's pages may lie more than 2^31 numbers behind the first's
    request, first = find_request(row_starts, tl.program_id(0), num_requests, rows_per_tile)
    row_end = tl.load(row_starts + request + 1)
    if first >= row_end:
        return
    length = tl.load(num_keys + request)
    # The query heads that share a kv head lie side by side in the tile: keys are loaded once for all of them.
    m = tl.arange(0, BLOCK_M)
    row = first + m // GROUP
    head = kv_head * GROUP + m % GROUP
    present = (m < rows_per_tile * GROUP) & (row < row_end)
    live = present & (tl.load(slots + row, mask=present, other=-1) >= 0)
    d = tl.arange(0, BLOCK_D)
    in_head = d < HEAD
    row64 = row.to(tl.int64)
    q_at = row64[:, None] * stride_qn + head[:, None] * stride_qh + d[None, :]
    q = tl.load(query + q_at, mask=live[:, None] & in_head[None, :], other=0.0).to(DOT)

    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    # A tile of padding rows alone reads no key.
    end = tl.where(tl.max(live.to(tl.int32), 0) > 0, length, 0)
    if HAS_LIMITS:
        limit = tl.load(limits + row, mask=live, other=length)
        # No key behind the last row's: it may never have been written.
        length = tl.minimum(length, tl.max(tl.where(live, limit, 0), 0))
        end = length
    for start in range(0, end, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)
        in_text = j < length
        if HAS_KEYS:
            key_start = tl.load(key_starts + request)
            chosen = tl.load(key_positions + tl.where(key_start >= 0, key_start + j, 0), mask=in_text, other=0)
            j = tl.where(key_start >= 0, chosen, j)
        block = tl.load(block_table + request * stride_table + j // BLOCK_SIZE, mask=in_text, other=0).to(tl.int64)
        at = block * stride_kb + kv_head * stride_kh + (j % BLOCK_SIZE) * stride_kn
        k = tl.load(kv_cache + at[None, :] + d[:, None], mask=in_text[None, :] & in_head[:, None], other=0.0).to(DOT)
        s = tl.dot(q, k, input_precision="ieee") * scale
        seen = in_text[None, :]
        if HAS_LIMITS:
            seen = seen & (j[None, :] < limit[:, None])
        s = tl.where(seen, s, float("-inf"))
        new_top = tl.maximum(top, tl.max(s, 1))
        p = tl.exp2(s - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(p, 1)
        if WRITE_OUTPUT:
            v_at = at[:, None] + HEAD + d[None, :]
            v = tl.load(kv_cache + v_at, mask=in_text[:, None] & in_head[None, :], other=0.0).to(DOT)
            acc = acc * shrink[:, None] + tl.dot(p.to(DOT), v, input_precision="ieee")
        top = new_top

    tl.store(lse + row64 * HEADS + head, top + tl.log2(tl.where(live, total, 1.0)), mask=live)
    if WRITE_OUTPUT:
        # Padding rows get zeros: they pass through the rest of the network.
        out = tl.where(live[:, None], acc / tl.where(live, total, 1.0)[:, None], 0.0)
        o_at = row64[:, None] * stride_on + head[:, None] * stride_oh + d[None, :]
        tl.store(output + o_at, out.to(output.dtype.element_ty), mask=present[:, None] & in_head[None, :])


@triton.jit(do_not_specialize=["num_requests"])
def _map_kernel(
    query,
    lse,
    kv_cache,
    block_table,
    row_starts,
    lengths,
    slots,
    memory,  # float32, the maps of all requests
    map_starts,  # [R] int64, -1 = no map
    num_requests,
    scale,
    stride_qn,
    stride_qh,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_table,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DOT: tl.constexpr,
):
    request, first = find_request(row_starts, tl.program_id(0), num_requests, ROWS)
    row_end = tl.load(row_starts + request + 1)
    length = tl.load(lengths + request)
    map_start = tl.load(map_starts + request)
    j = tl.program_id(1) * KEYS + tl.arange(0, KEYS)
    if (first >= row_end) | (map_start < 0) | (tl.program_id(1) * KEYS >= length):
        return
    row = first + tl.arange(0, ROWS)
    present = row < row_end
    live = present & (tl.load(slots + row, mask=present, other=-1) >= 0)
    in_text = j < length
    d = tl.arange(0, BLOCK_D)
    in_head = d < HEAD
    row64 = row.to(tl.int64)
    block = tl.load(block_table + request * stride_table + j // BLOCK_SIZE, mask=in_text, other=0).to(tl.int64)
    at = block * stride_kb + (j % BLOCK_SIZE) * stride_kn

    acc = tl.zeros([ROWS, KEYS], tl.float32)
    for kv_head in range(0, HEADS // GROUP):
        k_at = at[None, :] + kv_head * stride_kh.to(tl.int64) + d[:, None]
        k = tl.load(kv_cache + k_at, mask=in_text[None, :] & in_head[:, None], other=0.0).to(DOT)
        for g in range(0, GROUP):
            head = kv_head * GROUP + g
            q_at = row64[:, None] * stride_qn + head * stride_qh + d[None, :]
            q = tl.load(query + q_at, mask=live[:, None] & in_head[None, :], other=0.0).to(DOT)
            norm = tl.load(lse + row64 * HEADS + head, mask=live, other=float("inf"))
            acc += tl.exp2(tl.dot(q, k, input_precision="ieee") * scale - norm[:, None])
    target = map_start + (row64 - tl.load(row_starts + request))[:, None] * length + j[None, :]
    tl.store(memory + target, acc / HEADS, mask=present[:, None] & in_text[None, :])


def paged_attention(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    layout: PagedLayout,
    scale: float,
    output: torch.Tensor,
    maps: AttentionMaps | Sequence[torch.Tensor | None],
) -> None:
    """See ops.paged_attention; ``maps`` must be AttentionMaps, whose log-sum-exps are written too.

    Rows with slot -1 are padding: their output and map are zero, and no key is read for them.
    """
    assert isinstance(maps, AttentionMaps)
    lse = maps.lse if maps.lse is not None else query.new_empty(query.shape[:2], dtype=torch.float32)
    attend(query, kv_cache, layout, scale, output, lse)
    attention_maps(query, kv_cache, layout, scale, lse, maps)


def attend(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    layout: PagedLayout,
    scale: float,
    output: torch.Tensor | None,
    lse: torch.Tensor,
    tile: tuple[int, int] | None = None,
) -> None:
    """Output and log-sum-exp [N, heads] float32 (base 2); the latter alone where ``output`` is None.

    Args:
        tile: (row, head) pairs and keys at a time; None = ``tile_shape``.
    """
    num_rows, heads, head_size = query.shape
    kv_heads, block_size = kv_cache.shape[1:3]
    group = heads // kv_heads
    if num_rows == 0:
        return
    assert query.stride(2) == kv_cache.stride(3) == 1
    assert lse.is_contiguous()
    assert layout.slots.is_contiguous()
    pairs, keys = tile or tile_shape(query.dtype)
    pairs = max(pairs, triton.next_power_of_2(group))
    out = query if output is None else output
    assert out.stride(2) == 1
    grid = (num_tiles(num_rows, len(layout.counts), pairs // group), kv_heads)
    visible = layout.visible_keys
    assert visible is None or layout.limits is None
    _attention_kernel[grid](
        query,
        out,
        lse,
        kv_cache,
        layout.block_table,
        layout.row_starts,
        layout.text_lengths if visible is None else visible.counts,
        layout.slots,
        layout.text_lengths if visible is None else visible.positions,
        layout.text_lengths if visible is None else visible.starts,
        layout.text_lengths if layout.limits is None else layout.limits,
        len(layout.counts),
        scale * _LOG2_E,
        *query.stride()[:2],
        *out.stride()[:2],
        *kv_cache.stride()[:3],
        layout.block_table.stride(0),
        HEADS=heads,
        GROUP=group,
        HEAD=head_size,
        BLOCK_SIZE=block_size,
        BLOCK_M=pairs,
        BLOCK_N=keys,
        BLOCK_D=triton.next_power_of_2(head_size),
        DOT=dot_type(query.dtype),
        WRITE_OUTPUT=output is not None,
        HAS_KEYS=visible is not None,
        HAS_LIMITS=layout.limits is not None,
        # Tiles of K and V in flight; in fp32 three of them exceed the shared memory of many cards.
        num_stages=2 if query.dtype == torch.float32 else 3,
    )


def attention_maps(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    layout: PagedLayout,
    scale: float,
    lse: torch.Tensor,
    maps: AttentionMaps,
    tile: tuple[int, int] | None = None,
) -> None:
    """Write the maps of the requests that leave one, from the log-sum-exp of :func:`attend`.

    Args:
        tile: rows and keys at a time; None = ``tile_shape``.
    """
    num_rows, heads, head_size = query.shape
    kv_heads, block_size = kv_cache.shape[1:3]
    if num_rows == 0 or not maps.plan.elements:
        return
    assert layout.limits is None
    rows, keys = tile or tile_shape(query.dtype)
    grid = (num_tiles(num_rows, len(layout.counts), rows), triton.cdiv(max(layout.lengths), keys))
    _map_kernel[grid](
        query,
        lse,
        kv_cache,
        layout.block_table,
        layout.row_starts,
        layout.text_lengths,
        layout.slots,
        maps.memory,
        maps.plan.starts_on(query.device),
        len(layout.counts),
        scale * _LOG2_E,
        *query.stride()[:2],
        *kv_cache.stride()[:3],
        layout.block_table.stride(0),
        HEADS=heads,
        GROUP=heads // kv_heads,
        HEAD=head_size,
        BLOCK_SIZE=block_size,
        ROWS=rows,
        KEYS=keys,
        BLOCK_D=triton.next_power_of_2(head_size),
        DOT=dot_type(query.dtype),
    )
