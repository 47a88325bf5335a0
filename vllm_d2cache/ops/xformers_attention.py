"""Paged bidirectional attention by xformers; what it has no kernel for (maps, log-sum-exps) comes from ours.

xformers' own check decides which of its kernels runs: it depends on the GPU, the head size and the KV block size. Its
log-sum-exp has another layout in each of them, so ours is computed again where maps or replays need it: half an
attention more, which makes this path the better one only where no importance is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from vllm_d2cache.ops.paged_attention import AttentionMaps, PagedLayout
from vllm_d2cache.ops.xformers_build import PAGE, only_triton

if TYPE_CHECKING:
    from vllm_d2cache.ops.paged_attention import AttentionShape

# Modules of xformers.ops.fmha with paged attention, in the order in which they are tried.
_CANDIDATES = ("flash3", "flash", "triton_splitk")

_operator: Any = None  # set by prepare()


def prepare(device: torch.device, shape: AttentionShape) -> list[str]:
    """Pick the first of xformers' kernels that takes this shape on this device; else every kernel's reasons."""
    global _operator
    try:
        from xformers.ops import fmha
    except Exception as error:  # a build for another torch raises all kinds of errors
        return [f"importing xformers raised {type(error).__name__}: {str(error).splitlines()[0]}"]
    found = []
    for name in _CANDIDATES:
        module = getattr(fmha, name, None)
        if module is None:
            found.append(f"xformers' {name}: not in this version")
            continue
        why = _not_supported(fmha, module.FwOp, device, shape)
        if not why:
            _operator = module.FwOp
            return []
        found += [f"xformers' {name}: {reason}" for reason in why]
    return [*_in_short(shape), *found]


def _in_short(shape: AttentionShape) -> list[str]:
    """What an operator can do about it, before what xformers says of each kernel."""
    why = only_triton(torch.__version__)
    found = [f"xformers: {why}; only its Triton kernel is left"] if why else []
    if shape.block_size % PAGE:
        found.append(f"xformers' Triton kernel takes --block-size {PAGE} or a multiple, this is {shape.block_size}")
    return found


def _not_supported(fmha: Any, operator: Any, device: torch.device, shape: AttentionShape) -> list[str]:
    size = shape.block_size
    layout = PagedLayout(
        [2],
        [size],
        torch.zeros(1, 1, dtype=torch.int32, device=device),
        [0],
        torch.zeros(2, dtype=torch.int64, device=device),
    )
    cache = torch.zeros(shape.kv_heads, 1, size, 2 * shape.head_size, dtype=shape.dtype, device=device)
    query = torch.zeros(2, shape.heads, shape.head_size, dtype=shape.dtype, device=device)
    q, k, v, bias = _inputs(query, cache.transpose(0, 1), layout)
    return list(operator.not_supported_reasons(fmha.Inputs(q, k, v, attn_bias=bias, scale=1.0)))


def paged_attention(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    layout: PagedLayout,
    scale: float,
    output: torch.Tensor,
    maps: AttentionMaps | Sequence[torch.Tensor | None],
) -> None:
    """See ops.paged_attention; ``maps`` must be AttentionMaps."""
    from xformers.ops import fmha

    from vllm_d2cache.ops.triton.attention import attend, attention_maps
    from vllm_d2cache.ops.triton.attention import paged_attention as our_attention

    assert isinstance(maps, AttentionMaps)
    if query.shape[0] == 0:
        return
    if layout.visible_keys is not None or layout.limits is not None:
        # xformers attends to the first positions of a request, the same for all of its rows; ours to any.
        our_attention(query, kv_cache, layout, scale, output, maps)
        return
    q, k, v, bias = _inputs(query, kv_cache, layout)
    attended = fmha.memory_efficient_attention_forward(q, k, v, attn_bias=bias, scale=scale, op=_operator)
    output.copy_(attended.view(query.shape))
    output.masked_fill_((layout.slots < 0)[:, None, None], 0.0)
    if maps.lse is not None or maps.plan.elements:
        lse = maps.lse if maps.lse is not None else query.new_empty(query.shape[:2], dtype=torch.float32)
        attend(query, kv_cache, layout, scale, None, lse)
        attention_maps(query, kv_cache, layout, scale, lse, maps)


def _inputs(
    query: torch.Tensor, kv_cache: torch.Tensor, layout: PagedLayout
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Any]:
    """Queries [1, N, kv heads, group, D], keys and values [1, slots, kv heads, group, D], and the mask: all views."""
    blocks, kv_heads, block_size, both = kv_cache.shape
    num_rows, heads, head_size = query.shape
    group = heads // kv_heads
    pages = kv_cache.permute(0, 2, 1, 3)
    if pages.stride(0) != block_size * pages.stride(1):
        raise RuntimeError("xformers needs KV blocks one after the other (memory layout LHBNC)")
    flat = pages.flatten(0, 1).view(1, blocks * block_size, kv_heads, 1, both)
    flat = flat.expand(-1, -1, -1, group, -1)
    return (
        query.view(1, num_rows, kv_heads, group, head_size),
        flat[..., :head_size],
        flat[..., head_size:],
        _mask(layout, block_size),
    )


def _mask(layout: PagedLayout, block_size: int) -> Any:
    """xformers' description of the layout; made once a step."""
    if "_xformers" not in layout.__dict__:
        from xformers.ops.fmha.attn_bias import PagedBlockDiagonalPaddedKeysMask

        table = layout.block_table[: len(layout.counts)].contiguous()
        layout.__dict__["_xformers"] = PagedBlockDiagonalPaddedKeysMask.from_seqlens(
            layout.counts, layout.lengths, table, block_size, device=layout.slots.device
        )
    return layout.__dict__["_xformers"]
