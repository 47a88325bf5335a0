"""Head-averaged attention maps, a tile of rows and positions at a time, from the log-sum-exp that attention leaves.

Heads are added up in groups, and groups in their order: whether one program adds up all of them, or each group has a
program and a second kernel adds up what they leave, the numbers are the same.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from vllm_d2cache.ops.paged_attention import AttentionMaps, PagedLayout
from vllm_d2cache.ops.split import is_cut, kv_heads_at_once
from vllm_d2cache.ops.triton.common import kernel, model_constants, tile_shape
from vllm_d2cache.ops.triton.work import find_piece, pieces

_LOG2_E = math.log2(math.e)
# Rows and positions of a tile of the second kernel.
_SUM_TILE = (2, 256)


@triton.jit
def _add_heads(
    first_kv_head,
    end_kv_head,
    row64,
    live,
    at,  # [KEYS] int64, where the positions' pages are
    in_text,
    scale,
    query,
    lse,
    kv_cache,
    stride_qn,
    stride_qh,
    stride_kh,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DOT: tl.constexpr,
):
    """[ROWS, KEYS] probabilities, summed over the query heads of some kv heads."""
    d = tl.arange(0, BLOCK_D)
    in_head = d < HEAD
    acc = tl.zeros([ROWS, KEYS], tl.float32)
    for kv_head in range(first_kv_head, end_kv_head):
        k_at = kv_cache + kv_head * stride_kh.to(tl.int64) + at[None, :] + d[:, None]
        k = tl.load(k_at, mask=in_text[None, :] & in_head[:, None], other=0.0).to(DOT)
        for g in range(0, GROUP):
            head = kv_head * GROUP + g
            q_at = query + head * stride_qh + (row64[:, None] * stride_qn + d[None, :])
            q = tl.load(q_at, mask=live[:, None] & in_head[None, :], other=0.0).to(DOT)
            norm = tl.load(lse + head + row64 * HEADS, mask=live, other=float("inf"))
            acc += tl.exp2(tl.dot(q, k, input_precision="ieee") * scale - norm[:, None])
    return acc


@kernel("query lse kv_cache memory stride_qn stride_qh stride_kb stride_kh stride_kn")
def _map_kernel(
    query,
    lse,
    kv_cache,
    block_table,
    row_starts,
    lengths,
    piece_starts,  # [R + 1] int32, no pieces where no map is wanted
    slots,
    memory,  # float32, the maps of all requests; [groups, elements] where they are split
    map_starts,  # [R] int64, -1 = no map
    num_requests,
    elements,
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
    AT_ONCE: tl.constexpr,  # kv heads of a group
    SPLIT: tl.constexpr,  # a piece is one group; else all of them
):
    kv_heads: tl.constexpr = HEADS // GROUP
    groups: tl.constexpr = (kv_heads + AT_ONCE - 1) // AT_ONCE
    pieces_of_group = tl.load(piece_starts + num_requests)
    for piece in tl.range(
        tl.program_id(0), pieces_of_group * (groups if SPLIT else 1), tl.num_programs(0), disable_licm=True
    ):
        # In parts the tiles that are not padding come first; see attention.py.
        group = piece % groups if SPLIT else 0
        in_group_order = piece // groups if SPLIT else piece
        request, number = find_piece(piece_starts, in_group_order, num_requests)
        row_start, row_end = tl.load(row_starts + request), tl.load(row_starts + request + 1)
        tiles = tl.cdiv(row_end - row_start, ROWS)
        length = tl.load(lengths + request)
        columns = tl.cdiv(length, KEYS)
        tile = number // columns if SPLIT else number % tiles
        column = number % columns if SPLIT else number // tiles
        j = column * KEYS + tl.arange(0, KEYS)
        in_text = j < length
        row = row_start + tile * ROWS + tl.arange(0, ROWS)
        present = row < row_end
        live = present & (tl.load(slots + row, mask=present, other=-1) >= 0)
        row64 = row.to(tl.int64)
        block = tl.load(block_table + request * stride_table + j // BLOCK_SIZE, mask=in_text, other=0).to(tl.int64)
        at = block * stride_kb + (j % BLOCK_SIZE) * stride_kn
        # A tile of padding rows alone reads no key.
        some = tl.max(live.to(tl.int32), 0)
        if not SPLIT:
            own = memory + tl.load(map_starts + request) + (row64 - row_start)[:, None] * length + j[None, :]
            mask = present[:, None] & in_text[None, :]
        for i in range(group, group + 1 if SPLIT else groups):
            acc = _add_heads(
                i * AT_ONCE, some * tl.minimum((i + 1) * AT_ONCE, kv_heads), row64, live, at, in_text, scale,
                query, lse, kv_cache, stride_qn, stride_qh, stride_kh, HEADS, GROUP, HEAD, ROWS, KEYS, BLOCK_D, DOT,
            )  # fmt: skip
            if SPLIT:
                # Worked out behind the products: registers are what the kernel is short of.
                own = memory + tl.load(map_starts + request) + (row64 - row_start)[:, None] * length + j[None, :]
                own += group * elements.to(tl.int64)
                mask = present[:, None] & in_text[None, :]
            else:
                # For the same reason the sum so far stands in memory.
                if i > 0:
                    acc += tl.load(own, mask=mask, other=0.0)
                if i == groups - 1:
                    acc = tl.div_rn(acc, HEADS)
            tl.store(own, acc, mask=mask)
            if not SPLIT:
                tl.debug_barrier()  # another thread may read it for the next group


@kernel("memory parts")
def _map_sum_kernel(
    memory,  # float32, the maps of all requests
    parts,  # [GROUPS, elements] float32
    row_starts,
    lengths,
    piece_starts,
    slots,
    map_starts,
    num_requests,
    elements,
    HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    for piece in range(tl.program_id(0), tl.load(piece_starts + num_requests), tl.num_programs(0)):
        request, number = find_piece(piece_starts, piece, num_requests)
        row_start, row_end = tl.load(row_starts + request), tl.load(row_starts + request + 1)
        tiles = tl.cdiv(row_end - row_start, ROWS)
        length = tl.load(lengths + request)
        j = (number // tiles) * KEYS + tl.arange(0, KEYS)
        in_text = j < length
        row = row_start + (number % tiles) * ROWS + tl.arange(0, ROWS)
        present = row < row_end
        live = present & (tl.load(slots + row, mask=present, other=-1) >= 0)
        at = tl.load(map_starts + request) + (row - row_start).to(tl.int64)[:, None] * length + j[None, :]
        total = tl.zeros([ROWS, KEYS], tl.float32)
        for group in range(0, GROUPS):
            own = parts + group * elements.to(tl.int64)
            total += tl.load(own + at, mask=live[:, None] & in_text[None, :], other=0.0)
        tl.store(memory + at, tl.div_rn(total, HEADS), mask=present[:, None] & in_text[None, :])


def attention_maps(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    layout: PagedLayout,
    scale: float,
    lse: torch.Tensor,
    maps: AttentionMaps,
    tile: tuple[int, int] | None = None,
    split: bool | None = None,
) -> None:
    """Write the maps of the requests that leave one, from the log-sum-exp of :func:`attention.attend`.

    Args:
        tile: rows and keys at a time; None = ``tile_shape``.
        split: whether each group of heads has a program of its own; None = where tiles alone do not fill a card. The
            results are the same.
    """
    num_rows, heads, kv_heads = *query.shape[:2], kv_cache.shape[1]
    if num_rows == 0 or not maps.plan.elements:
        return
    assert layout.limits is None
    rows, keys = tile or tile_shape(query.dtype)
    at_once = kv_heads_at_once(heads, kv_heads)
    groups = triton.cdiv(kv_heads, at_once)
    if split is None:
        split = is_cut(triton.cdiv(num_rows, rows) * triton.cdiv(max(layout.lengths), keys), groups)
    elements = maps.plan.elements
    memory = query.new_empty(groups * elements, dtype=torch.float32) if split else maps.memory
    work = pieces(layout, rows, keys, maps.plan)
    _map_kernel[(work.programs(groups if split else 1),)](
        query,
        lse,
        kv_cache,
        layout.block_table,
        layout.row_starts,
        layout.text_lengths,
        work.starts,
        layout.slots,
        memory,
        maps.plan.starts_on(query.device),
        len(layout.counts),
        elements,
        scale * _LOG2_E,
        *query.stride()[:2],
        *kv_cache.stride()[:3],
        layout.block_table.stride(0),
        ROWS=rows,
        KEYS=keys,
        AT_ONCE=at_once,
        SPLIT=split,
        num_stages=2 if split else 3,  # with three in parts, some compilers are short of registers
        num_warps=4 if query.dtype == torch.float32 else 8,  # with four, 16 bits run out of registers
        **model_constants(query, kv_cache),
    )
    if split:
        _add_groups(layout, maps, memory, heads, groups)


def _add_groups(layout: PagedLayout, maps: AttentionMaps, parts: torch.Tensor, heads: int, groups: int) -> None:
    rows, keys = _SUM_TILE
    work = pieces(layout, rows, keys, maps.plan)
    _map_sum_kernel[(work.programs(),)](
        maps.memory,
        parts,
        layout.row_starts,
        layout.text_lengths,
        work.starts,
        layout.slots,
        maps.plan.starts_on(parts.device),
        len(layout.counts),
        maps.plan.elements,
        HEADS=heads,
        GROUPS=groups,
        ROWS=rows,
        KEYS=keys,
    )
