"""Refuses damaged weights before anything is served: with a NaN among them every answer would be silent nonsense."""

from __future__ import annotations

from collections.abc import Iterable

import torch

_TYPES = (torch.float32, torch.float16, torch.bfloat16)


def check_finite(parameters: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Look at every floating-point parameter once.

    A sum is finite only if all of its terms are, and needs no memory; quantised types have no NaN to look for.

    Raises:
        ValueError: names the first damaged tensor and says how many there are.
    """
    named = [(name, parameter) for name, parameter in parameters if parameter.dtype in _TYPES]
    if not named:
        return
    with torch.no_grad():
        sums = torch.stack([parameter.sum(dtype=torch.float32) for _, parameter in named])
    finite = torch.isfinite(sums).tolist()
    damaged = [name for (name, _), fine in zip(named, finite, strict=True) if not fine]
    if damaged:
        raise ValueError(
            f"the checkpoint is damaged: {len(damaged)} of {len(named)} tensors hold NaN or infinity, "
            f"e.g. {damaged[0]}; download or convert it again"
        )
