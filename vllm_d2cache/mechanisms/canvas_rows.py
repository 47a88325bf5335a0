"""The rows of a step from the position before a request's canvas on, and their places: what mechanisms remember of."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate

import torch

from vllm_d2cache.canvas.rows import StepRows


def canvas_places(rows: StepRows) -> tuple[torch.Tensor, torch.Tensor]:
    """The place [N - S] int64 of each row, that of the position before its canvas first; and [R] int64, how many rows
    each request has from there on. Rows before it have negative places.

    A shifted family reads its first slot from the position before the canvas.
    """
    place = rows.text_positions - rows.view.prompt_len[rows.request] + 1
    return place, per_request(rows, place >= 0)


def per_request(rows: StepRows, flags: torch.Tensor) -> torch.Tensor:
    """[R] int64: how many of its rows are flagged in [N - S] bool."""
    return torch.zeros_like(rows.view.prompt_len).index_add_(0, rows.request, flags.long())


def canvas_rows(
    rows: StepRows, place: torch.Tensor, sizes: Sequence[int], chosen: Iterable[int]
) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    """Of some requests, the rows [n] int64 from the position before the canvas on, and their places.

    Args:
        place: see canvas_places; ``sizes`` likewise, on the host.
    """
    ends = list(accumulate(rows.counts))
    index = torch.arange(place.shape[0], device=place.device)
    return {r: (index[ends[r] - sizes[r] : ends[r]], place[ends[r] - sizes[r] : ends[r]]) for r in chosen}
