"""Numbers over canvas slots as numbers over positions, and back."""

from __future__ import annotations

import torch

from vllm_d2cache.ops.columns import columns
from vllm_d2cache.ops.dispatch import dispatched

_TRITON = "vllm_d2cache.ops.triton.canvas_columns"


@dispatched(_TRITON)
def to_positions(values: torch.Tensor, first: torch.Tensor, length: torch.Tensor, width: int) -> torch.Tensor:
    """[R, width] of the type of ``values`` [R, G]: slot g at position ``first`` [R] + g, 0 elsewhere.

    Args:
        first: [R] int64, position of slot 0, at least 0.
        length: [R] int64, slots of each row; columns behind them are ignored.
    """
    slot = columns(values.shape[1], values.device)
    # Slots past a row's canvas land in a column that is cut off.
    index = torch.where(slot < length.unsqueeze(1), first.unsqueeze(1) + slot, width)
    return values.new_zeros(values.shape[0], width + 1).scatter_(1, index, values)[:, :width]


@dispatched(_TRITON)
def to_slots(values: torch.Tensor, first: torch.Tensor, length: torch.Tensor, width: int) -> torch.Tensor:
    """[R, width] bool: what ``values`` [R, T] has at position ``first`` [R] + g; False from ``length`` [R] and T on."""
    slot = columns(width, values.device)
    index = first.unsqueeze(1) + slot
    inside = (slot < length.unsqueeze(1)) & (index < values.shape[1])
    return values.gather(1, index.clamp(max=values.shape[1] - 1)) & inside
