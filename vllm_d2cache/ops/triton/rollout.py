"""The rollout chain of a whole batch: one launch a layer for kept maps, one more where maps are computed again."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from vllm_d2cache.ops.host import upload
from vllm_d2cache.ops.paged_attention import PagedLayout
from vllm_d2cache.ops.rollout import LayerRecord, TensorParallel
from vllm_d2cache.ops.triton.common import kernel, model_constants, tile_shape
from vllm_d2cache.ops.triton.work import find_piece, pieces

_LOG2_E = math.log2(math.e)
# Rows of a kept map, and positions, that are added up at a time. Not measured on a GPU yet.
_ROWS, _COLUMNS = 64, 16
# More rows than a request has: a piece has all of them.
_ALL_ROWS = 1 << 24


@kernel("out v memory")
def _map_product_kernel(
    out,  # [R, width] float32
    v,  # [R, width] float32
    memory,  # maps, float32
    map_starts,  # [R] int64
    row_starts,  # [R + 1] int32
    lengths,  # [R] int32
    piece_starts,  # [R + 1] int32, no pieces where there is no map
    positions,  # [N] int64
    slots,  # [N] int64
    num_requests,
    stride,  # of out and v
    OWN: tl.constexpr,  # add what a position keeps; else the product alone
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    for piece in range(tl.program_id(0), tl.load(piece_starts + num_requests), tl.num_programs(0)):
        request, number = find_piece(piece_starts, piece, num_requests)
        length = tl.load(lengths + request)
        j = number * COLUMNS + tl.arange(0, COLUMNS)
        in_text = j < length
        line = request.to(tl.int64) * stride
        begin = tl.load(row_starts + request)
        end = tl.load(row_starts + request + 1)
        map_start = tl.load(map_starts + request)
        acc = tl.zeros([COLUMNS], tl.float32)
        refreshed = tl.zeros([COLUMNS], tl.int32)
        for start in range(begin, end, ROWS):
            row = start + tl.arange(0, ROWS)
            live = (row < end) & (tl.load(slots + row, mask=row < end, other=-1) >= 0)
            position = tl.load(positions + row, mask=live, other=-1)
            u = 0.5 * tl.load(v + line + position, mask=live, other=0.0)
            at = map_start + (row - begin).to(tl.int64)[:, None] * length + j[None, :]
            a = tl.load(memory + at, mask=live[:, None] & in_text[None, :], other=0.0)
            acc += tl.sum(u[:, None] * a, 0)
            refreshed += tl.sum((position[:, None] == j[None, :]).to(tl.int32), 0)
        if OWN:
            acc += tl.load(v + line + j, mask=in_text, other=0.0) * tl.where(refreshed > 0, 0.5, 1.0)
        tl.store(out + line + j, acc, mask=in_text)


@kernel("out v query lse kv_cache stride_qn stride_qh stride_kb stride_kh stride_kn")
def _replay_kernel(
    out,  # [m, heads, width] float32: each head's product
    v,  # [R, width] float32
    requests,  # [m] int64, which requests
    query,  # [N, HEADS, HEAD]
    lse,  # [N, HEADS] float32
    kv_cache,
    block_table,
    row_starts,
    lengths,
    positions,
    slots,
    stride_out,
    stride_v,
    scale,  # times log2(e)
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
    COLUMNS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DOT: tl.constexpr,
):
    index = tl.program_id(0)
    head = tl.program_id(2)
    request = tl.load(requests + index)
    length = tl.load(lengths + request)
    if tl.program_id(1) * COLUMNS >= length:
        return
    j = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    in_text = j < length
    d = tl.arange(0, BLOCK_D)
    in_head = d < HEAD
    block = tl.load(block_table + request * stride_table + j // BLOCK_SIZE, mask=in_text, other=0).to(tl.int64)
    at = block * stride_kb + (head // GROUP).to(tl.int64) * stride_kh + (j % BLOCK_SIZE) * stride_kn
    k = tl.load(kv_cache + at[None, :] + d[:, None], mask=in_text[None, :] & in_head[:, None], other=0.0).to(DOT)
    begin = tl.load(row_starts + request)
    end = tl.load(row_starts + request + 1)
    acc = tl.zeros([COLUMNS], tl.float32)
    for start in range(begin, end, ROWS):
        row = start + tl.arange(0, ROWS)
        live = (row < end) & (tl.load(slots + row, mask=row < end, other=-1) >= 0)
        position = tl.load(positions + row, mask=live, other=0)
        u = 0.5 * tl.load(v + request * stride_v + position, mask=live, other=0.0)
        row64 = row.to(tl.int64)
        q_at = row64[:, None] * stride_qn + head * stride_qh + d[None, :]
        q = tl.load(query + q_at, mask=live[:, None] & in_head[None, :], other=0.0).to(DOT)
        norm = tl.load(lse + row64 * HEADS + head, mask=live, other=float("inf"))
        p = tl.exp2(tl.dot(q, k, input_precision="ieee") * scale - norm[:, None])
        acc += tl.sum(u[:, None] * p, 0)
    tl.store(out + (index.to(tl.int64) * HEADS + head) * stride_out + j, acc, mask=in_text)


def batched_rollout(
    positions: torch.Tensor,
    layers: list[LayerRecord],
    layout: PagedLayout,
    wanted: list[bool],
    num_positions: int,
    tensor_parallel: TensorParallel | None,
    request: torch.Tensor | None = None,
) -> torch.Tensor:
    """See ops.rollout. Sums run in a fixed order: the result is the same in every run and beside any mates."""
    device, num_requests = positions.device, len(wanted)
    column = torch.arange(num_positions, device=device)
    inside = column < layout.text_lengths.unsqueeze(1)
    if not all(wanted):
        inside &= upload(wanted, torch.bool, device).unsqueeze(1)
    v = inside.float()
    if not layers or not layout.counts or positions.shape[0] == 0:
        return v
    plan = layers[0].maps.plan
    replayed = [r for r in range(num_requests) if wanted[r] and plan.shapes[r] is None]
    positions = positions.contiguous()  # a column of the indices of a mask
    keep = None
    if replayed or tensor_parallel is not None:
        keep = _kept_share(positions, layout, v)
    indices = upload(replayed, torch.int64, device) if replayed else None
    # Layers write to the one and to the other in turn. Requests without a map keep their line, which is in both; the
    # replayed ones are written below.
    spare = v.clone() if tensor_parallel is None else None
    for layer in reversed(layers):
        out = torch.zeros_like(v) if spare is None else spare
        if plan.elements:
            _map_product(out, v, layer, layout, positions, own=tensor_parallel is None)
        if indices is not None:
            product = _replay(v, indices, layer, layout, positions)
            own = 0.0 if tensor_parallel is not None or keep is None else (keep * v)[indices]
            out[indices] = product + own
        if tensor_parallel is not None:
            assert keep is not None
            v = keep * v + tensor_parallel.all_reduce(out) / tensor_parallel.size
        else:
            v, spare = out, v
    return v


def _kept_share(positions: torch.Tensor, layout: PagedLayout, v: torch.Tensor) -> torch.Tensor:
    """[R, width] float32: the part of its mass that a position keeps in a layer, a half if it was refreshed."""
    counts = layout.row_starts.diff().long()
    request = torch.repeat_interleave(counts, output_size=positions.shape[0])
    keep = torch.ones(v.shape[0], v.shape[1] + 1, device=v.device)
    # Padding rows write to a column that is cut off.
    keep[request, torch.where(layout.slots >= 0, positions, v.shape[1])] = 0.5
    return keep[:, :-1]


def _map_product(
    out: torch.Tensor, v: torch.Tensor, layer: LayerRecord, layout: PagedLayout, positions: torch.Tensor, own: bool
) -> None:
    plan = layer.maps.plan
    work = pieces(layout, _ALL_ROWS, _COLUMNS, plan)
    _map_product_kernel[(work.programs(),)](
        out,
        v,
        layer.maps.memory,
        plan.starts_on(v.device),
        layout.row_starts,
        layout.text_lengths,
        work.starts,
        positions,
        layout.slots,
        len(layout.counts),
        v.stride(0),
        OWN=own,
        ROWS=_ROWS,
        COLUMNS=_COLUMNS,
    )


def _replay(
    v: torch.Tensor, indices: torch.Tensor, layer: LayerRecord, layout: PagedLayout, positions: torch.Tensor
) -> torch.Tensor:
    """[m, width] products of the requests ``indices``, whose maps are computed again and never stored."""
    query, kv_cache, lse = layer.queries, layer.kv_cache, layer.maps.lse
    assert query is not None
    assert lse is not None
    heads = query.shape[1]
    products = torch.zeros(indices.shape[0], heads, v.shape[1], device=v.device)
    rows, columns = tile_shape(query.dtype)
    grid = (indices.shape[0], triton.cdiv(max(layout.lengths), columns), heads)
    _replay_kernel[grid](
        products,
        v,
        indices,
        query,
        lse,
        kv_cache,
        layout.block_table,
        layout.row_starts,
        layout.text_lengths,
        positions,
        layout.slots,
        products.stride(1),
        v.stride(0),
        layer.scale * _LOG2_E,
        *query.stride()[:2],
        *kv_cache.stride()[:3],
        layout.block_table.stride(0),
        ROWS=rows,
        COLUMNS=columns,
        **model_constants(query, kv_cache),
    )
    return products.mean(1)
