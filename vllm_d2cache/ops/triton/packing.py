"""Marked columns packed side by side: a program a line."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_d2cache.ops.packing import Packed
from vllm_d2cache.ops.triton.common import kernel

_BLOCK = 1024


@triton.jit
def sum_before(counts, row, BLOCK: tl.constexpr):
    """The sum of the counts of the lines before ``row``."""
    lane, total = tl.arange(0, BLOCK), tl.zeros((BLOCK,), tl.int64)
    for first in range(0, row, BLOCK):
        total += tl.load(counts + first + lane, mask=first + lane < row, other=0)
    return tl.sum(total, 0)


@triton.jit
def pack_line(line, column, place, marked, row, start, room, width, BLOCK: tl.constexpr):
    """The marked columns of line ``row`` into its places, -1 where there are more places; ``marked`` is its own."""
    lane = tl.arange(0, BLOCK)
    # All places are left over until a column takes them.
    for first in range(0, room, BLOCK):
        inside = first + lane < room
        tl.store(line + start + first + lane, tl.zeros((BLOCK,), tl.int64) + row, mask=inside)
        tl.store(column + start + first + lane, tl.full((BLOCK,), -1, tl.int64), mask=inside)
    tl.debug_barrier()
    before = tl.zeros((), tl.int64)
    for first in range(0, width, BLOCK):
        at = first + lane
        flag = tl.load(marked + at, mask=at < width, other=0).to(tl.int64)
        within = before + tl.cumsum(flag, 0) - 1
        tl.store(place + row * width + at, start + within, mask=at < width)
        tl.store(column + start + within, at.to(tl.int64), mask=(flag != 0) & (within < room))
        before += tl.sum(flag, 0)
    tl.debug_barrier()


@kernel()
def _pack_kernel(
    line,  # [size] int64, written
    column,  # [size] int64, written
    place,  # [R, W] int64, written
    marked,  # [R, W] bool
    starts,  # [R] int64
    places,  # [R] int64
    width,
    stride_m,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    start, room = tl.load(starts + row), tl.load(places + row)
    pack_line(line, column, place, marked + row * stride_m, row, start, room, width, BLOCK)


def pack_columns(marked: torch.Tensor, starts: torch.Tensor, places: torch.Tensor, size: int) -> Packed:
    """See ops.packing."""
    rows, width = marked.shape
    line, column = (torch.empty(size, dtype=torch.int64, device=marked.device) for _ in range(2))
    place = torch.empty(rows, width, dtype=torch.int64, device=marked.device)
    assert marked.stride(1) == 1
    _pack_kernel[(rows,)](
        line,
        column,
        place,
        marked,
        starts.contiguous(),
        places.contiguous(),
        width,
        marked.stride(0),
        BLOCK=_BLOCK,
    )
    return Packed(line, column, place)
