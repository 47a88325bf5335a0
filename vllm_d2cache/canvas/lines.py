"""Records whose tensors have a line for each request of a step."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, Self

import torch


@dataclass(frozen=True)
class Lines:
    """Base of records whose every tensor has a line for each request."""

    def select(self, rows: torch.Tensor) -> Self:
        """The same of some requests only: [m] int64 lines."""
        return replace(self, **{field.name: _selected(getattr(self, field.name), rows) for field in fields(self)})


def _selected(value: Any, rows: torch.Tensor) -> Any:
    if isinstance(value, torch.Tensor):
        return value[rows]
    if isinstance(value, tuple):
        parts = [_selected(part, rows) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return value.select(rows) if isinstance(value, Lines) else value
