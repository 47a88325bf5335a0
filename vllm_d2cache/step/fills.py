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

    deciding: list[int]  # lines of the batch whose requests decide
    lines: list[int]  # lines of those that are filled
    order: torch.Tensor  # [R] int64: both, one behind the other
    slots: list[int]  # of those that are filled
    counts: list[int]  # rows of each
    lengths: list[int]  # the position behind the last one of each
    positions: torch.Tensor  # [F] int64
    input_ids: torch.Tensor  # [F] int32
    request: torch.Tensor  # [F] int64, which of ``slots`` each belongs to


def begin_fills(canvas: CanvasStates, slots: Sequence[int], reaches: Sequence[int]) -> Fills | None:
    """What a step only fills, where texts are computed in pieces; None = all of its requests decide.

    Args:
        slots: of the batch's requests, on the host.
        reaches: up to which position each may be computed. One whose first step that leaves out is filled.
    """
    deciding: list[int] = []
    filled: list[int] = []
    for line, (slot, reach) in enumerate(zip(slots, reaches, strict=True)):
        request = canvas.requests[slot]
        request.reach = reach
        if reach < request.first_end:
            filled.append(line)
            continue
        deciding.append(line)
        if 0 < request.computed < request.length:
            canvas.refresh[slot, : request.computed] = False  # its first plan is to compute all of the prompt
    return _fill(canvas, deciding, filled, slots, reaches) if filled else None


def _fill(
    canvas: CanvasStates, deciding: list[int], filled: list[int], slots: Sequence[int], reaches: Sequence[int]
) -> Fills:
    """The rows of the lines ``filled``; from then on they are computed."""
    own, ends = [slots[n] for n in filled], [reaches[n] for n in filled]
    starts = [canvas.requests[slot].computed for slot in own]
    counts = [end - start for start, end in zip(starts, ends, strict=True)]
    for slot, end in zip(own, ends, strict=True):
        canvas.requests[slot].computed = end
    which = np.arange(len(own)).repeat(counts)
    # Of each row: its place in all of them, less the first place of its request, from its first position on.
    offset = np.array(starts) - np.array(list(accumulate(counts[:-1], initial=0)))
    position = np.arange(len(which)) + offset[which]
    numbers = [which, position, np.array(own)[which], np.array(deciding + filled)]
    request, where, owner, order = upload_arrays(numbers, canvas.device)
    return Fills(deciding, filled, order, own, counts, ends, where, canvas.tokens[owner, where], request)
