"""Watches what torch operations allocate."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Shapes(TorchDispatchMode):
    """Notes the shape of everything any torch operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[tuple[int, ...], str] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.seen.setdefault(tuple(tensor.shape), str(func))
        return out

    def squares(self, side: int) -> dict[tuple[int, ...], str]:
        """Shapes with two dimensions of at least ``side``."""
        return {shape: name for shape, name in self.seen.items() if sum(d >= side for d in shape) >= 2}
