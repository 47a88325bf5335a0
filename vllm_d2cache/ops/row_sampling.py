"""What the rows of a step are sampled with, and the random numbers of those that are."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch

from vllm_d2cache.ops.dispatch import dispatched
from vllm_d2cache.ops.random import uniform


class RowSampling(NamedTuple):
    """The first four of ops.row_stats.RowParams."""

    temperature: torch.Tensor  # [n] float32, 0 = greedy
    top_p: torch.Tensor  # [n] float32, 1 = off
    top_k: torch.Tensor  # [n] int64, 0 = off
    draw: torch.Tensor | None  # [n] float64 in [0, 1)


@dispatched("vllm_d2cache.ops.triton.row_sampling")
def sampling_of_rows(
    who: torch.Tensor,
    slot: torch.Tensor,
    slots: torch.Tensor,
    prompt_len: torch.Tensor,
    sampling: torch.Tensor,
    seeds: tuple[torch.Tensor, torch.Tensor] | None,
) -> RowSampling:
    """Those of canvas slots ``slot`` [n] int64 of requests ``who`` [n] int64.

    Args:
        slots, prompt_len: [R] int64.
        sampling: [S, 3] float32 of all worker slots: temperature, top_p, top_k.
        seeds: [S] int64 each, seed and number of the step; None where no row is sampled.
    """
    owner = slots[who]
    temperature, top_p, top_k = sampling[owner].unbind(1)
    draw = None if seeds is None else uniform(seeds[0][owner], seeds[1][owner], prompt_len[who] + slot)
    return RowSampling(temperature, top_p, top_k.long(), draw)


@lru_cache(maxsize=8)
def sampling_of_nobody(device: torch.device) -> RowSampling:
    """Of a step without temperatures and filters: none of it is read."""
    none = torch.empty(0, device=device)
    return RowSampling(none, none, torch.empty(0, dtype=torch.int64, device=device), None)
