"""Ragged work cut into pieces of one size, counted on the device: a grid need not know whose piece is which.

A request's rows and keys make tiles; its pieces are numbered behind those of the requests before it. Programs take
piece after piece until there are none left. So in a CUDA graph, whose grid goes by capacities, no program is started
for tiles that might have been, and a program without a piece ends after one load.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from vllm_d2cache.ops.paged_attention import MapPlan, PagedLayout
from vllm_d2cache.ops.split import MOST_STRETCHES, STRETCH, most_stretches, num_stretches
from vllm_d2cache.ops.triton.common import kernel, num_tiles

_STRETCH, _MOST_STRETCHES = tl.constexpr(STRETCH), tl.constexpr(MOST_STRETCHES)
# Programs of a multiprocessor, as far as registers go (tests/triton/test_compiles_for_hopper.py), and what they need of
# its shared memory.
_PROGRAMS_PER_PROCESSOR, _SHARED_MEMORY = 2, 48 << 10
# Where there is no GPU: the H100's.
_PROCESSORS = 132
_BLOCK = 64


@triton.jit
def stretch_of(length):
    """Keys of one stretch of a request with ``length`` keys."""
    return _STRETCH * tl.maximum(tl.cdiv(length, _STRETCH * _MOST_STRETCHES), 1)


@kernel()
def _count_kernel(
    starts,  # [R + 1] int32
    row_starts,  # [R + 1] int32
    lengths,  # [R] int32
    chosen,  # [R] int64, < 0 = the request has no pieces
    num_requests,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,  # 0 = a piece has all columns, -1 = a stretch of them
    CHOOSES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    tl.store(starts, 0)
    total = 0
    for begin in range(0, num_requests, BLOCK):
        r = begin + tl.arange(0, BLOCK)
        inside = r < num_requests
        rows = tl.load(row_starts + r + 1, mask=inside, other=0) - tl.load(row_starts + r, mask=inside, other=0)
        pieces = tl.cdiv(rows, ROWS)
        if COLUMNS != 0:
            length = tl.load(lengths + r, mask=inside, other=0)
            if COLUMNS > 0:
                pieces *= tl.cdiv(length, COLUMNS)
            else:
                pieces *= tl.cdiv(length, stretch_of(length))
        if CHOOSES:
            pieces = tl.where(tl.load(chosen + r, mask=inside, other=-1) >= 0, pieces, 0)
        tl.store(starts + r + 1, total + tl.cumsum(pieces, 0), mask=inside)
        total += tl.sum(pieces, 0)


@triton.jit
def find_piece(starts, piece, num_requests):
    """(request, number of the piece within it)."""
    low = 0
    high = num_requests
    while low < high:
        middle = (low + high) // 2
        if tl.load(starts + middle + 1) <= piece:
            low = middle + 1
        else:
            high = middle
    return low, piece - tl.load(starts + low)


class Pieces(NamedTuple):
    """Of all requests of a step."""

    starts: torch.Tensor  # [R + 1] int32: the first piece of each request, and the number of all
    most: int  # how many there can be
    capacities: bool  # ``most`` goes by capacities: nearly all of them may be nobody's

    def programs(self, times: int = 1) -> int:
        """How many to start where each piece is to be done so many times, for heads or groups of them."""
        most = max(1, self.most * times)
        return min(most, _resident(self.starts.device)) if self.capacities else most


def pieces(layout: PagedLayout, rows: int, columns: int, plan: MapPlan | None = None) -> Pieces:
    """Counted once a step.

    Args:
        rows: of a piece.
        columns: keys of a piece; 0 = all of the request's, -1 = a stretch.
        plan: only the requests that leave a map have pieces, and their columns are all positions.
    """
    known: dict[Any, Any] = layout.__dict__.setdefault("_pieces", {})
    key = (rows, columns, id(plan))
    if key not in known:
        device, count = layout.slots.device, len(layout.counts)
        starts = torch.empty(count + 1, dtype=torch.int32, device=device)
        visible = None if plan is not None else layout.visible_keys
        lengths = layout.text_lengths if visible is None else visible.counts
        _count_kernel[(1,)](
            starts,
            layout.row_starts,
            lengths,
            lengths if plan is None else plan.starts_on(device),
            count,
            ROWS=rows,
            COLUMNS=columns,
            CHOOSES=plan is not None,
            BLOCK=_BLOCK,
        )
        found = Pieces(starts, _most(layout, rows, columns, plan), layout.capacities)
        known[key] = found, plan  # while the plan lives, nobody else has its id
    return known[key][0]


def _most(layout: PagedLayout, rows: int, columns: int, plan: MapPlan | None) -> int:
    """Pieces of all requests, at most; by what the host knows of them."""
    if layout.capacities:
        length = max(layout.lengths)
        across = most_stretches(length) if columns < 0 else triton.cdiv(length, columns) if columns else 1
        return num_tiles(sum(layout.counts), len(layout.counts), rows) * across
    total = 0
    for r, (count, length) in enumerate(zip(layout.counts, layout.lengths, strict=True)):
        if plan is None or plan.shapes[r] is not None:
            across = num_stretches(length) if columns < 0 else triton.cdiv(length, columns) if columns else 1
            total += triton.cdiv(count, rows) * across
    return total


@functools.cache
def _resident(device: torch.device) -> int:
    """Programs that a device holds at a time."""
    if device.type != "cuda":
        return _PROGRAMS_PER_PROCESSOR * _PROCESSORS
    properties = torch.cuda.get_device_properties(device)
    memory = getattr(properties, "shared_memory_per_multiprocessor", _SHARED_MEMORY)
    return properties.multi_processor_count * max(1, min(_PROGRAMS_PER_PROCESSOR, memory // _SHARED_MEMORY))
