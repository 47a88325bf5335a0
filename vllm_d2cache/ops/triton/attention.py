"""Paged bidirectional attention of scattered query rows, with log-sum-exp and head-averaged maps.

Keys are attended to in stretches (work.py), in tiles with a running maximum. A stretch comes to a maximum, a sum and an
output of its own, and these are put together in the order of the stretches, by the same operations whether one program
does them all or each has one and a second kernel puts them together. So what is chosen to fill the card, by the batch
or by the capacities of a graph, changes no bit of anybody's result. Tile sizes go by the model's shape alone. The maps
are a kernel of their own (maps.py). Nothing of the size [heads, rows, T] exists.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from vllm_d2cache.ops.paged_attention import AttentionMaps, PagedLayout
from vllm_d2cache.ops.split import is_cut, most_stretches
from vllm_d2cache.ops.triton.common import ALL_REGISTERS, architecture, kernel, model_constants, tile_shape
from vllm_d2cache.ops.triton.maps import attention_maps
from vllm_d2cache.ops.triton.work import find_piece, pieces, stretch_of

__all__ = ["attend", "attention_maps", "paged_attention"]

_LOG2_E = math.log2(math.e)
# Heads whose stretches a program puts together.
_HEADS_AT_ONCE = 16


@triton.jit
def _attend_to(
    q,  # [BLOCK_M, BLOCK_D]
    begin,
    end,
    request,
    kv_head,
    scale,
    limit,  # [BLOCK_M], a row sees keys before this one
    kv_cache,
    block_table,
    key_positions,
    key_starts,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_table,
    HEAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DOT: tl.constexpr,
    WITH_VALUES: tl.constexpr,
    HAS_KEYS: tl.constexpr,
    HAS_LIMITS: tl.constexpr,
):
    """Maximum, sum and unnormalised output of the keys from ``begin`` to ``end`` of a request."""
    d = tl.arange(0, BLOCK_D)
    in_head = d < HEAD
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(begin, end, BLOCK_N):
        # A stretch is a multiple of a tile; its keys lie block by block in the pages.
        j = tl.multiple_of(start, BLOCK_N) + tl.arange(0, BLOCK_N)
        inside = j < end
        if HAS_KEYS:
            key_start = tl.load(key_starts + request)
            chosen = tl.load(key_positions + tl.where(key_start >= 0, key_start + j, 0), mask=inside, other=0)
            j = tl.where(key_start >= 0, chosen, j)
        block = tl.load(block_table + request * stride_table + j // BLOCK_SIZE, mask=inside, other=0).to(tl.int64)
        at = block * stride_kb + kv_head * stride_kh + (j % BLOCK_SIZE) * stride_kn
        k = tl.load(kv_cache + at[None, :] + d[:, None], mask=inside[None, :] & in_head[:, None], other=0.0).to(DOT)
        s = tl.dot(q, k, input_precision="ieee") * scale
        s = tl.where(inside[None, :], s, float("-inf"))
        if HAS_LIMITS:
            s = tl.where(j[None, :] < limit[:, None], s, float("-inf"))
        new_top = tl.maximum(top, tl.max(s, 1))
        # A row may see nothing of a stretch.
        base = tl.where(new_top == float("-inf"), 0.0, new_top) if HAS_LIMITS else new_top
        p = tl.exp2(s - base[:, None])
        shrink = tl.exp2(top - base)
        total = tl.fma(total, shrink, tl.sum(p, 1))
        if WITH_VALUES:
            v_at = at[:, None] + HEAD + d[None, :]
            v = tl.load(kv_cache + v_at, mask=inside[:, None] & in_head[None, :], other=0.0).to(DOT)
            acc = tl.dot(p.to(DOT), v, acc * shrink[:, None], input_precision="ieee")
        top = new_top
    return top, total, acc


@triton.jit
def _put_together(top, total, acc, next_top, next_total, next_acc):
    """What two stretches come to. Written out, as it must round alike in both kernels."""
    new_top = tl.maximum(top, next_top)
    shrink, weight = tl.exp2(top - new_top), tl.exp2(next_top - new_top)
    total = tl.fma(next_total, weight, total * shrink)
    weights, shrinks = tl.broadcast_to(weight[:, None], acc.shape), tl.broadcast_to(shrink[:, None], acc.shape)
    return new_top, total, tl.fma(next_acc, weights, acc * shrinks)


@kernel("query output lse part_acc kv_cache stride_qn stride_qh stride_on stride_oh stride_kb stride_kh stride_kn")
def _attention_kernel(
    query,  # [N, heads, HEAD]
    output,  # [N, heads, HEAD]
    lse,  # [N, heads] float32, base 2
    part_acc,  # [stretches, N, heads, HEAD] float32, of a stretch each
    part_top,  # [stretches, N, heads] float32
    part_total,  # likewise
    kv_cache,  # [blocks, kv heads, BLOCK_SIZE, 2 * HEAD]
    block_table,  # [R, blocks] int32
    row_starts,  # [R + 1] int32
    num_keys,  # [R] int32
    piece_starts,  # [R + 1] int32
    slots,  # [N] int64, -1 = padding row
    key_positions,  # flat int32
    key_starts,  # [R] int64 into key_positions, -1 = key j is position j
    limits,  # [N] int32, a row attends to positions before this one
    num_requests,
    num_rows,
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
    SPLIT: tl.constexpr,  # a piece is one stretch; else all of them
):
    rows_per_tile: tl.constexpr = BLOCK_M // GROUP
    kv_heads: tl.constexpr = HEADS // GROUP
    pieces_of_head = tl.load(piece_starts + num_requests)
    for piece in tl.range(tl.program_id(0), pieces_of_head * kv_heads, tl.num_programs(0), disable_licm=True):
        # A request's last tiles may be padding: in parts the first ones come first, under all heads, so that every
        # program gets some of them. Whole, the tiles of a head come together, as they read the same keys.
        kv_head = piece % kv_heads if SPLIT else piece // pieces_of_head
        in_head_order = piece // kv_heads if SPLIT else piece % pieces_of_head
        request, number = find_piece(piece_starts, in_head_order, num_requests)
        row_start, row_end = tl.load(row_starts + request), tl.load(row_starts + request + 1)
        length = tl.load(num_keys + request)
        stretch = stretch_of(length)
        stretches = tl.cdiv(length, stretch) if SPLIT else 1
        # The query heads that share a kv head lie side by side in the tile: keys are loaded once for all of them.
        m = tl.arange(0, BLOCK_M)
        row = row_start + (number // stretches) * rows_per_tile + m // GROUP
        head = kv_head * GROUP + m % GROUP
        present = (m < rows_per_tile * GROUP) & (row < row_end)
        live = present & (tl.load(slots + row, mask=present, other=-1) >= 0)
        d = tl.arange(0, BLOCK_D)
        in_head = d < HEAD
        row64, kv_head64 = row.to(tl.int64), kv_head.to(tl.int64)  # pages may lie 2^31 numbers behind the first head's
        q_at = row64[:, None] * stride_qn + head[:, None] * stride_qh + d[None, :]
        q = tl.load(query + q_at, mask=live[:, None] & in_head[None, :], other=0.0).to(DOT)

        top = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        begin = 0
        # A tile of padding rows alone reads no key.
        end = tl.where(tl.max(live.to(tl.int32), 0) > 0, length, 0)
        limit = row
        if HAS_LIMITS:
            limit = tl.load(limits + row, mask=live, other=0)
            # No key behind the last row's: it may never have been written.
            end = tl.minimum(end, tl.max(limit, 0))
        if SPLIT:
            begin = (number % stretches) * stretch
            end = tl.minimum(end, begin + stretch)
            top, total, acc = _attend_to(
                q, begin, end, request, kv_head64, scale, limit,
                kv_cache, block_table, key_positions, key_starts, stride_kb, stride_kh, stride_kn, stride_table,
                HEAD, BLOCK_SIZE, BLOCK_M, BLOCK_N, BLOCK_D, DOT, WRITE_OUTPUT, HAS_KEYS, HAS_LIMITS,
            )  # fmt: skip
        else:
            for first in range(begin, end, stretch):
                next_top, next_total, next_acc = _attend_to(
                    q, first, tl.minimum(first + stretch, end), request, kv_head64, scale, limit,
                    kv_cache, block_table, key_positions, key_starts, stride_kb, stride_kh, stride_kn, stride_table,
                    HEAD, BLOCK_SIZE, BLOCK_M, BLOCK_N, BLOCK_D, DOT, WRITE_OUTPUT, HAS_KEYS, HAS_LIMITS,
                )  # fmt: skip
                top, total, acc = _put_together(top, total, acc, next_top, next_total, next_acc)

        if SPLIT:
            at = ((number % stretches) * num_rows.to(tl.int64) + row64) * HEADS + head
            tl.store(part_top + at, top, mask=live)
            tl.store(part_total + at, total, mask=live)
            if WRITE_OUTPUT:
                tl.store(part_acc + at[:, None] * HEAD + d[None, :], acc, mask=live[:, None] & in_head[None, :])
        else:
            tl.store(lse + row64 * HEADS + head, top + tl.log2(tl.where(live, total, 1.0)), mask=live)
            if WRITE_OUTPUT:
                # Padding rows get zeros: they pass through the rest of the network.
                out = tl.where(live[:, None], acc / tl.where(live, total, 1.0)[:, None], 0.0)
                o_at = row64[:, None] * stride_on + head[:, None] * stride_oh + d[None, :]
                tl.store(output + o_at, out.to(output.dtype.element_ty), mask=present[:, None] & in_head[None, :])


@kernel("output lse part_acc stride_on stride_oh")
def _combine_kernel(
    output,
    lse,
    part_acc,
    part_top,
    part_total,
    row_starts,
    num_keys,
    slots,
    num_requests,
    num_rows,
    stride_on,
    stride_oh,
    HEADS: tl.constexpr,
    HEAD: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WRITE_OUTPUT: tl.constexpr,
):
    row = tl.program_id(0)
    row64 = row.to(tl.int64)
    live = tl.load(slots + row) >= 0
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    exists = head < HEADS
    d = tl.arange(0, BLOCK_D)
    mask = exists[:, None] & (d < HEAD)[None, :]
    top = tl.full([BLOCK_H], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_H], tl.float32)
    acc = tl.zeros([BLOCK_H, BLOCK_D], tl.float32)
    stretches = 0
    if live:
        request, _ = find_piece(row_starts, row, num_requests)
        length = tl.load(num_keys + request)
        stretches = tl.cdiv(length, stretch_of(length))
    for i in range(0, stretches):
        at = (i * num_rows.to(tl.int64) + row64) * HEADS + head
        next_top = tl.load(part_top + at, mask=exists, other=0.0)
        next_total = tl.load(part_total + at, mask=exists, other=1.0)
        next_acc = acc
        if WRITE_OUTPUT:
            next_acc = tl.load(part_acc + at[:, None] * HEAD + d[None, :], mask=mask, other=0.0)
        top, total, acc = _put_together(top, total, acc, next_top, next_total, next_acc)
    answered = head < tl.where(live, HEADS, 0)
    total = tl.where(answered, total, 1.0)
    tl.store(lse + row64 * HEADS + head, top + tl.log2(total), mask=answered)
    if WRITE_OUTPUT:
        out = tl.where(answered[:, None], acc / total[:, None], 0.0)
        tl.store(
            output + row64 * stride_on + head[:, None] * stride_oh + d[None, :],
            out.to(output.dtype.element_ty),
            mask=mask,
        )


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
    split: bool | None = None,
) -> None:
    """Output and log-sum-exp [N, heads] float32 (base 2); the latter alone where ``output`` is None.

    Args:
        tile: (row, head) pairs and keys at a time; None = ``tile_shape``.
        split: whether each stretch of keys has a program of its own; None = where rows alone do not fill a card. The
            results are the same.
    """
    num_rows, kv_heads = query.shape[0], kv_cache.shape[1]
    group = query.shape[1] // kv_heads
    if num_rows == 0:
        return
    assert query.stride(2) == kv_cache.stride(3) == 1 and lse.is_contiguous() and layout.slots.is_contiguous()
    pairs, keys = tile or tile_shape(query.dtype)
    pairs, out = max(pairs, triton.next_power_of_2(group)), query if output is None else output
    assert out.stride(2) == 1
    rows, stretches = pairs // group, most_stretches(max(layout.lengths))
    split = is_cut(triton.cdiv(num_rows, rows) * kv_heads, stretches) if split is None else split
    parts = _parts(query, stretches if split else 0, output is not None)
    visible, limits = layout.visible_keys, layout.limits
    assert visible is None or limits is None
    num_keys = layout.text_lengths if visible is None else visible.counts
    work = pieces(layout, rows, -1 if split else 0)
    where = (kv_cache, layout.block_table, layout.row_starts, num_keys, work.starts, layout.slots)
    _attention_kernel[(work.programs(kv_heads),)](
        query,
        out,
        lse,
        *parts,
        *where,
        layout.text_lengths if visible is None else visible.positions,
        layout.text_lengths if visible is None else visible.starts,
        layout.text_lengths if limits is None else limits,
        len(layout.counts),
        num_rows,
        scale * _LOG2_E,
        *(*query.stride()[:2], *out.stride()[:2], *kv_cache.stride()[:3], layout.block_table.stride(0)),
        BLOCK_M=pairs,
        BLOCK_N=keys,
        HAS_KEYS=visible is not None,
        HAS_LIMITS=limits is not None,
        SPLIT=split,
        WRITE_OUTPUT=output is not None,
        num_stages=_stages(split, query.dtype),
        **model_constants(query, kv_cache),
        **_registers(split, group),
    )
    if split:
        _combine(layout, num_keys, out, lse, parts)


def _stages(split: bool, dtype: torch.dtype) -> int:
    """Tiles of K and V in flight.

    In fp32 three of them exceed the shared memory of many cards; whole, where the stretches before are kept as well,
    the registers of a thread.
    """
    return 3 if split and dtype != torch.float32 else 2


def _registers(split: bool, group: int) -> dict[str, int]:
    """Two blocks share a multiprocessor, for which a thread of each may use all registers that it can have.

    Where query heads share kv heads the compiler takes what it needs of itself, but on sm_80.
    """
    return ALL_REGISTERS if not split and (group == 1 or architecture() == 80) else {}


def _combine(
    layout: PagedLayout, num_keys: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, parts: tuple[torch.Tensor, ...]
) -> None:
    """Put the stretches of every row together; ``out`` is left alone where they have no values."""
    num_rows, heads, head_size = out.shape
    at_once = min(_HEADS_AT_ONCE, triton.next_power_of_2(heads))
    _combine_kernel[(num_rows, triton.cdiv(heads, at_once))](
        out,
        lse,
        *parts,
        layout.row_starts,
        num_keys,
        layout.slots,
        len(layout.counts),
        num_rows,
        *out.stride()[:2],
        HEADS=heads,
        HEAD=head_size,
        BLOCK_H=at_once,
        BLOCK_D=triton.next_power_of_2(head_size),
        WRITE_OUTPUT=parts[0].shape[3] > 0,
    )


def _parts(query: torch.Tensor, stretches: int, with_values: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Memory for what each stretch comes to; none where there are none."""
    num_rows, heads, head_size = query.shape
    top, total = query.new_empty(2, stretches, num_rows, heads, dtype=torch.float32)
    size = head_size if with_values else 0
    return query.new_empty(stretches, num_rows, heads, size, dtype=torch.float32), top, total
