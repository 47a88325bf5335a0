"""Pieces of prompts whose K and V are only stored: what comes before the first step of a text that is cut into blocks.

A request that is being filled takes no part in the step's decisions: nothing is predicted, committed or planned, and no
step of it is counted. Its rows go through the layers behind those of its mates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch

from vllm_d2cache.canvas.states import CanvasStates
from vllm_d2cache.ops.host import upload_arrays


@dataclass(frozen=True)
class Fills:
    """F rows of the requests of a step that are being filled: contiguous, request by request."""

    slots: list[int]
    counts: list[int]  # rows of each request
    lengths: list[int]  # the position behind the last one of each
    positions: torch.Tensor  # [F] int64
    input_ids: torch.Tensor  # [F] int32
    request: torch.Tensor  # [F] int64, which of ``slots`` each belongs to

    @classmethod
    def of(cls, canvas: CanvasStates, slots: Sequence[int], reaches: Sequence[int]) -> Fills:
        """What has not been computed of these requests, up to the positions ``reaches``."""
        starts = [canvas.requests[slot].computed for slot in slots]
        counts = [reach - start for start, reach in zip(starts, reaches, strict=True)]
        line = np.arange(len(slots)).repeat(counts)
        # Of each row: its place in all of them, less the first place of its request, from its first position on.
        offset = np.array(starts) - np.array(list(accumulate(counts[:-1], initial=0)))
        position = np.arange(len(line)) + offset[line]
        slot = np.array(slots)[line]
        request, where, owner = upload_arrays([line, position, slot], canvas.device)
        return cls(list(slots), counts, list(reaches), where, canvas.tokens[owner, where], request)


def part_lines(canvas: CanvasStates, slots: Sequence[int], reaches: Sequence[int]) -> tuple[list[int], list[int]]:
    """Which lines of a batch decide in this step, and which are only filled.

    Args:
        reaches: up to which position each may be computed.
    """
    filling = [reach < canvas.requests[slot].first_end for slot, reach in zip(slots, reaches, strict=True)]
    return (
        [line for line, fills in enumerate(filling) if not fills],
        [line for line, fills in enumerate(filling) if fills],
    )
