"""Counter-based uniform numbers: a draw depends on (seed, step, position) alone, never on the batch or the device."""

from __future__ import annotations

import torch


def _signed(value: int) -> int:
    """A 64-bit constant as the int64 torch can hold."""
    return value - (1 << 64) if value >= 1 << 63 else value


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_MIX_1 = _signed(0xBF58476D1CE4E5B9)
_MIX_2 = _signed(0x94D049BB133111EB)


def _shift_right(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical (zero-filling) right shift of int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: torch.Tensor) -> torch.Tensor:
    """The finaliser of splitmix64 (Steele, Lea and Flood, 2014)."""
    x = (x ^ _shift_right(x, 30)) * _MIX_1
    x = (x ^ _shift_right(x, 27)) * _MIX_2
    return x ^ _shift_right(x, 31)


def uniform(seed: torch.Tensor, step: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    """Numbers in [0, 1), one for each triple.

    Args:
        seed, step, position: int64 tensors of one shape.

    Returns:
        float64 tensor of that shape.
    """
    state = _mix(seed + _GOLDEN)
    state = _mix(state + step * _GOLDEN)
    state = _mix(state + position * _GOLDEN)
    return _shift_right(state, 11).double() * 2.0**-53
