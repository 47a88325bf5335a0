"""The rows of a step from the position before a request's canvas on, and their places: what mechanisms remember of."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import accumulate

import torch

from vllm_d2cache.canvas.rows import StepRows


def canvas_rows(rows: StepRows, chosen: Iterable[int]) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    """Of some requests, the rows [n] int64 from the position before the canvas on, and their places, that one's first.

    A shifted family reads its first slot from the position before the canvas.
    """
    place = rows.text_positions - rows.view.prompt_len[rows.request] + 1
    sizes = torch.zeros_like(rows.view.prompt_len).index_add_(0, rows.request, (place >= 0).long()).tolist()
    ends = list(accumulate(rows.counts))
    found = {r: torch.arange(ends[r] - sizes[r], ends[r], device=place.device) for r in chosen}
    return {r: (mine, place[mine]) for r, mine in found.items()}
