"""Numbers over canvas slots as numbers over positions, and back."""

from __future__ import annotations

import torch

from vllm_d2cache.ops.dispatch import dispatched
from vllm_d2cache.ops.text_columns import PositionMap, SlotMap, position_map, slot_map

_TRITON = "vllm_d2cache.ops.triton.canvas_columns"


@dispatched(_TRITON)
def to_positions(values: torch.Tensor, first: torch.Tensor, length: torch.Tensor, width: int) -> torch.Tensor:
    """[R, width] of the type of ``values`` [R, G]: slot g at position ``first`` [R] + g, 0 elsewhere.

    Args:
        first: [R] int64, position of slot 0, at least 0.
        length: [R] int64, slots of each row; columns behind them are ignored.
    """
    where, slots = (tuple(first.tolist()), tuple(length.tolist())), values.shape[1]
    found = position_map(where[0], width, where[1], slots, values.device)
    return at_positions(values, found) if values.dtype == torch.bool else _numbers_at(values, found)


@dispatched(_TRITON)
def to_slots(values: torch.Tensor, first: torch.Tensor, length: torch.Tensor, width: int) -> torch.Tensor:
    """[R, width] bool: what ``values`` [R, T] has at position ``first`` [R] + g; False from ``length`` [R] and T on."""
    where, positions = (tuple(first.tolist()), tuple(length.tolist())), values.shape[1]
    return at_slots(values, slot_map(where[0], width, where[1], positions, values.device))


def at_positions(values: torch.Tensor, found: PositionMap) -> torch.Tensor:
    """[R, T] bool: each position has what ``values`` [R, G] has at its slot, False without one."""
    return values.gather(1, found.at).logical_and_(found.inside)


def _numbers_at(values: torch.Tensor, found: PositionMap) -> torch.Tensor:
    """[R, T]: as :func:`at_positions`, of any numbers; 0 without a slot."""
    return values.gather(1, found.at).masked_fill_(~found.inside, 0)


def at_slots(values: torch.Tensor, found: SlotMap) -> torch.Tensor:
    """[R, G] bool: each slot has what ``values`` [R, T] has at its position, False without one."""
    return values.gather(1, found.at).logical_and_(found.inside)
