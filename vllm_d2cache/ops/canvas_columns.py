"""Numbers over canvas slots as numbers over positions, and back."""

from __future__ import annotations

import torch

from vllm_d2cache.ops.dispatch import dispatched
from vllm_d2cache.ops.text_columns import SlotMap, position_map, slot_map

_TRITON = "vllm_d2cache.ops.triton.canvas_columns"


@dispatched(_TRITON)
def to_positions(values: torch.Tensor, first: torch.Tensor, length: torch.Tensor, width: int) -> torch.Tensor:
    """[R, width] of the type of ``values`` [R, G]: slot g at position ``first`` [R] + g, 0 elsewhere.

    Args:
        first: [R] int64, position of slot 0, at least 0.
        length: [R] int64, slots of each row; columns behind them are ignored.
    """
    where, slots = (tuple(first.tolist()), tuple(length.tolist())), values.shape[1]
    return at_positions(values, position_map(where[0], slots, where[1], width, values.device), width)


@dispatched(_TRITON)
def to_slots(values: torch.Tensor, first: torch.Tensor, length: torch.Tensor, width: int) -> torch.Tensor:
    """[R, width] bool: what ``values`` [R, T] has at position ``first`` [R] + g; False from ``length`` [R] and T on."""
    where, positions = (tuple(first.tolist()), tuple(length.tolist())), values.shape[1]
    return at_slots(values, slot_map(where[0], width, where[1], positions, values.device))


def at_positions(values: torch.Tensor, positions: torch.Tensor, width: int) -> torch.Tensor:
    """[R, width]: each of ``values`` [R, G] at its position [R, G] int64, 0 elsewhere; it has none at ``width``."""
    # Slots past a row's canvas land in a column that is cut off.
    return values.new_zeros(values.shape[0], width + 1).scatter_(1, positions, values)[:, :width]


def at_slots(values: torch.Tensor, found: SlotMap) -> torch.Tensor:
    """[R, G] bool: each slot has what ``values`` [R, T] has at its position, False without one."""
    return values.gather(1, found.at).logical_and_(found.inside)
