"""The numbers of columns, which many ops compare with: made once for each width, as they are the same in every step."""

from __future__ import annotations

from functools import lru_cache

import torch


@lru_cache(maxsize=64)
def columns(width: int, device: torch.device) -> torch.Tensor:
    """[1, width] int64: 0, 1, 2 and so on. Shared: it is never written."""
    return torch.arange(width, device=device).unsqueeze(0)
