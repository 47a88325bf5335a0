"""Marked columns of ragged lines, packed side by side into as many places as the host has set aside for each line."""

from __future__ import annotations

from typing import NamedTuple

import torch

from vllm_d2cache.ops.columns import columns
from vllm_d2cache.ops.dispatch import dispatched


class Packed(NamedTuple):
    """Where the marked columns went; ``size`` places, line after line."""

    line: torch.Tensor  # [size] int64, the line each place belongs to
    column: torch.Tensor  # [size] int64 ascending within a line, -1 = a place left over
    # [R, W] int64, place of each marked column; of any other, the place of the last marked one on its left
    place: torch.Tensor


@dispatched("vllm_d2cache.ops.triton.packing")
def pack_columns(marked: torch.Tensor, starts: torch.Tensor, places: torch.Tensor, size: int) -> Packed:
    """Give the marked columns of each line its places, from the left; what remains of them is left over.

    Shapes depend on ``size`` alone, so that nothing waits for the device. A line with more marked columns than places
    loses the last ones; it never writes into the next line's.

    Args:
        marked: [R, W] bool.
        starts: [R] int64, first place of each line.
        places: [R] int64, how many it has; they sum to ``size``.
    """
    first, device = starts.unsqueeze(1), marked.device
    place = marked.cumsum(1).add_(first - 1)
    fits = marked & (place < first + places.unsqueeze(1))
    # Whatever has no place lands in one that is cut off.
    target = torch.where(fits, place, size)
    column = columns(marked.shape[1], device).expand_as(marked)
    packed = torch.full((size + 1,), -1, device=device).scatter_(0, target.flatten(), column.flatten())
    line = columns(marked.shape[0], device)[0].repeat_interleave(places, output_size=size)
    return Packed(line, packed[:size], place)
