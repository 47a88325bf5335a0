"""Scatter of fresh keys and values into their pages."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_d2cache.ops.triton.common import kernel


@kernel("kv_cache key value stride_cb stride_ch stride_cn stride_kn stride_kh stride_vn stride_vh")
def _write_kernel(
    kv_cache,  # [blocks, kv heads, BLOCK_SIZE, 2 * HEAD]
    key,  # [N, kv heads, HEAD]
    value,
    slots,  # [N] int64
    stride_cb,
    stride_ch,
    stride_cn,
    stride_kn,
    stride_kh,
    stride_vn,
    stride_vh,
    KV_HEADS: tl.constexpr,
    HEAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,  # KV_HEADS * HEAD rounded up
):
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + row)
    if slot < 0:
        return
    i = tl.arange(0, BLOCK)
    head = (i // HEAD).to(tl.int64)  # a head's pages may lie more than 2^31 numbers behind the first's
    d = i % HEAD
    mask = i < KV_HEADS * HEAD
    target = (slot // BLOCK_SIZE) * stride_cb + head * stride_ch + (slot % BLOCK_SIZE) * stride_cn + d
    k = tl.load(key + row * stride_kn + head * stride_kh + d, mask=mask)
    v = tl.load(value + row * stride_vn + head * stride_vh + d, mask=mask)
    tl.store(kv_cache + target, k.to(kv_cache.dtype.element_ty), mask=mask)
    tl.store(kv_cache + target + HEAD, v.to(kv_cache.dtype.element_ty), mask=mask)


def write_kv(kv_cache: torch.Tensor, key: torch.Tensor, value: torch.Tensor, slots: torch.Tensor) -> None:
    """See ops.paged_attention; rows with slot -1 are not written anywhere."""
    num_rows, kv_heads, head_size = key.shape
    if num_rows == 0:
        return
    assert kv_cache.stride(3) == key.stride(2) == value.stride(2) == 1
    assert slots.is_contiguous()
    _write_kernel[(num_rows,)](
        kv_cache,
        key,
        value,
        slots,
        *kv_cache.stride()[:3],
        *key.stride()[:2],
        *value.stride()[:2],
        KV_HEADS=kv_heads,
        HEAD=head_size,
        BLOCK_SIZE=kv_cache.shape[2],
        BLOCK=triton.next_power_of_2(kv_heads * head_size),
    )
