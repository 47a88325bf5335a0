"""Rotation of queries and keys, and the scatter of keys and values into their pages, in one launch.

A thread has both numbers that turn together, so that queries may be rotated where they stand.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_d2cache.ops.triton.common import kernel

# Heads of a program: 16 bytes of each half for a thread, with heads of 128 numbers of 16 bits.
_HEADS_AT_ONCE = 16


@triton.jit
def _turn(source, cos, sin, half, mask):
    """(first half, second half) of the numbers at ``source``, rotated in fp32."""
    first = tl.load(source, mask=mask, other=0.0)
    second = tl.load(source + half, mask=mask, other=0.0)
    x, y = first.to(tl.float32), second.to(tl.float32)
    return (x * cos - y * sin).to(first.dtype), (y * cos + x * sin).to(first.dtype)


@kernel(
    "kv_cache query key value cos_sin query_out key_out stride_cb stride_ch stride_cn stride_qn stride_qh "
    "stride_kn stride_kh stride_vn stride_vh stride_table stride_qon stride_qoh stride_kon stride_koh"
)
def _rotate_kernel(
    kv_cache,  # [blocks, kv heads, BLOCK_SIZE, 2 * HEAD]
    query,  # [N, HEADS, HEAD]
    key,  # [N, KV_HEADS, HEAD]
    value,
    positions,  # [N] int64
    cos_sin,  # [positions, 2 * HALF]
    slots,  # [in_pages] int64
    query_out,
    key_out,
    in_pages,
    stride_cb,
    stride_ch,
    stride_cn,
    stride_qn,
    stride_qh,
    stride_kn,
    stride_kh,
    stride_vn,
    stride_vh,
    stride_table,
    stride_qon,
    stride_qoh,
    stride_kon,
    stride_koh,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_HALF: tl.constexpr,  # HALF rounded up
    BLOCK_REST: tl.constexpr,  # HEAD - 2 * HALF rounded up, 0 = nothing passes
    BLOCK_D: tl.constexpr,  # HEAD rounded up
    KEY_OUT: tl.constexpr,
):
    query_blocks: tl.constexpr = (HEADS + BLOCK_H - 1) // BLOCK_H
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    paged = row < in_pages
    slot = tl.load(slots + row, mask=paged, other=-1)
    padding = paged & (slot < 0)
    position = tl.where(padding, 0, tl.load(positions + row))
    i = tl.arange(0, BLOCK_HALF)
    turns = i < HALF
    cos = tl.load(cos_sin + position * stride_table + i, mask=turns, other=0.0).to(tl.float32)[None, :]
    sin = tl.load(cos_sin + position * stride_table + HALF + i, mask=turns, other=0.0).to(tl.float32)[None, :]
    if block < query_blocks:
        head = (block * BLOCK_H + tl.arange(0, BLOCK_H))[:, None].to(tl.int64)
        mask = (head < HEADS) & turns[None, :]
        read = mask & (head < tl.where(padding, 0, HEADS))
        out = query_out + row * stride_qon + head * stride_qoh
        first, second = _turn(query + row * stride_qn + head * stride_qh + i[None, :], cos, sin, HALF, read)
        tl.store(out + i[None, :], first, mask=mask)
        tl.store(out + HALF + i[None, :], second, mask=mask)
        if BLOCK_REST > 0:
            rest = 2 * HALF + tl.arange(0, BLOCK_REST)[None, :]
            here = (head < HEADS) & (rest < HEAD)
            read = here & (head < tl.where(padding, 0, HEADS))
            x = tl.load(query + row * stride_qn + head * stride_qh + rest, mask=read, other=0.0)
            tl.store(out + rest, x, mask=here)
    elif padding == 0:
        head = ((block - query_blocks) * BLOCK_H + tl.arange(0, BLOCK_H))[:, None].to(tl.int64)
        exists = head < KV_HEADS
        in_page = head < tl.where(paged, KV_HEADS, 0)
        # A head's pages may lie more than 2^31 numbers behind the first's.
        page = kv_cache + (slot // BLOCK_SIZE) * stride_cb + head * stride_ch + (slot % BLOCK_SIZE) * stride_cn
        out = key_out + row * stride_kon + head * stride_koh
        source = key + row * stride_kn + head * stride_kh
        first, second = _turn(source + i[None, :], cos, sin, HALF, exists & turns[None, :])
        tl.store(page + i[None, :], first, mask=in_page & turns[None, :])
        tl.store(page + HALF + i[None, :], second, mask=in_page & turns[None, :])
        if KEY_OUT:
            tl.store(out + i[None, :], first, mask=exists & turns[None, :])
            tl.store(out + HALF + i[None, :], second, mask=exists & turns[None, :])
        if BLOCK_REST > 0:
            rest = 2 * HALF + tl.arange(0, BLOCK_REST)[None, :]
            x = tl.load(source + rest, mask=exists & (rest < HEAD), other=0.0)
            tl.store(page + rest, x, mask=in_page & (rest < HEAD))
            if KEY_OUT:
                tl.store(out + rest, x, mask=exists & (rest < HEAD))
        d = tl.arange(0, BLOCK_D)[None, :]
        v = tl.load(value + row * stride_vn + head * stride_vh + d, mask=in_page & (d < HEAD), other=0.0)
        tl.store(page + HEAD + d, v, mask=in_page & (d < HEAD))


def rotate_and_write(
    kv_cache: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    positions: torch.Tensor,
    cos_sin: torch.Tensor,
    slots: torch.Tensor,
    query_out: torch.Tensor,
    key_out: torch.Tensor | None = None,
) -> None:
    """See ops.rotary; nothing is read of padding rows."""
    num_rows, heads, head_size = query.shape
    kv_heads, half = key.shape[1], cos_sin.shape[1] // 2
    if num_rows == 0:
        return
    assert kv_cache.stride(3) == query.stride(2) == key.stride(2) == value.stride(2) == query_out.stride(2) == 1
    assert cos_sin.stride(1) == 1
    assert positions.is_contiguous()
    assert slots.is_contiguous()
    at_once = min(_HEADS_AT_ONCE, triton.next_power_of_2(max(heads, kv_heads)))
    rest = head_size - 2 * half
    keys = key if key_out is None else key_out
    _rotate_kernel[(num_rows, triton.cdiv(heads, at_once) + triton.cdiv(kv_heads, at_once))](
        kv_cache,
        query,
        key,
        value,
        positions,
        cos_sin,
        slots,
        query_out,
        keys,
        slots.shape[0],
        *kv_cache.stride()[:3],
        *query.stride()[:2],
        *key.stride()[:2],
        *value.stride()[:2],
        cos_sin.stride(0),
        *query_out.stride()[:2],
        *keys.stride()[:2],
        HEADS=heads,
        KV_HEADS=kv_heads,
        HEAD=head_size,
        HALF=half,
        BLOCK_SIZE=kv_cache.shape[2],
        BLOCK_H=at_once,
        BLOCK_HALF=triton.next_power_of_2(half),
        BLOCK_REST=triton.next_power_of_2(rest) if rest else 0,
        BLOCK_D=triton.next_power_of_2(head_size),
        KEY_OUT=key_out is not None,
        enable_fp_fusion=False,  # each product is rounded, as in PyTorch
    )
