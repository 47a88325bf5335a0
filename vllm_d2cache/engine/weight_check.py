"""Refuses damaged weights before anything is served: with a NaN among them every answer would be silent nonsense.

Tensors are looked at as they come out of the checkpoint. Afterwards is too late: vLLM's layers pack some parameters
into their own form and leave nothing of them, depending on the CPU and on the quantisation.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

# What holds larger numbers than float16.
_OFFERED = ("bfloat16", "float32")
_WIDE = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
# Types without a minimum of their own; bfloat16 holds each of their numbers.
_NARROW = (torch.float8_e4m3fn, torch.float8_e5m2)


def finite_weights(
    weights: Iterable[tuple[str, torch.Tensor]], dtype: torch.dtype
) -> Iterator[tuple[str, torch.Tensor]]:
    """The same tensors by name, each looked at once on its way.

    Args:
        weights: tensors of a checkpoint, of any shape; integers have nothing to look for.
        dtype: what they are loaded as: a number beyond it would become infinity.

    Raises:
        ValueError: behind the last tensor; says how many are damaged and names the first.
    """
    damaged: list[str] = []
    too_large: list[str] = []
    count, most = 0, 0.0
    for name, tensor in weights:
        count += 1
        if (largest := _largest(tensor)) is not None:
            if not largest < torch.inf:  # nor is NaN
                damaged.append(name)
            elif largest > torch.finfo(dtype).max:
                too_large.append(name)
                most = max(most, largest)
        yield name, tensor
    if damaged:
        raise ValueError(
            f"the checkpoint is damaged: {len(damaged)} of {count} tensors hold NaN or infinity, "
            f"e.g. {damaged[0]}; download or convert it again"
        )
    if too_large:
        holds = [other for other in _OFFERED if most <= torch.finfo(getattr(torch, other)).max]
        raise ValueError(
            f"--dtype {str(dtype).removeprefix('torch.')} cannot hold numbers of {len(too_large)} of {count} tensors, "
            f"e.g. {too_large[0]}; "
            + (f"take {' or '.join(holds)}" if holds else "no other can: convert the checkpoint again")
        )


def _largest(tensor: torch.Tensor) -> float | None:
    """Largest magnitude, or NaN if there is one; None if there is nothing to look at."""
    if tensor.dtype not in (*_WIDE, *_NARROW) or tensor.numel() == 0:
        return None
    # One pass without memory of its own; NaN wins against every number.
    low, high = (tensor.bfloat16() if tensor.dtype in _NARROW else tensor).aminmax()
    return float(torch.maximum(high, -low))
