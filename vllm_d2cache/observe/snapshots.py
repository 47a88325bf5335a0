"""Snapshots of a canvas while it fills up: asked for by a request, carried from worker to scheduler, put into words.

A step's report has a line for each request of the batch, and costs all of them what its widest line costs. The
canvases of those who watch are therefore written one behind the other and cut into as many pieces as there are lines.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from itertools import groupby
from typing import Any

import torch

from vllm_d2cache.canvas.states import CanvasStates
from vllm_d2cache.ops.host import upload

MASKED = -1
# What a snapshot has no token and no mask for: past the canvas, or behind a stop token.
_NOTHING = -2


def take_snapshots(canvas: CanvasStates, slots: Sequence[int]) -> torch.Tensor:
    """The canvases of ``slots`` as they are: [n, G] int64, token ids, -1 for a mask, -2 past the last slot that counts.

    Slots behind a committed stop token do not count: nothing of them is ever emitted.
    """
    index = upload(slots, torch.int64, canvas.device)
    width = max(canvas.requests[s].canvas_len for s in slots)
    column = torch.arange(width, device=canvas.device)
    positions = canvas.prompt_len[index].unsqueeze(1) + column
    tokens = canvas.tokens[index].gather(1, positions.clamp(max=canvas.tokens.shape[1] - 1)).long()
    terminal = canvas.terminal[index, :width].to(torch.int32)
    dead = (terminal.cumsum(1) > terminal) | (column >= canvas.canvas_len[index].unsqueeze(1))
    return tokens.masked_fill_(canvas.masked[index, :width], MASKED).masked_fill_(dead, _NOTHING)


def append_snapshots(
    report: torch.Tensor, canvas: CanvasStates, slots: Sequence[int], watched: Collection[int]
) -> torch.Tensor:
    """A step's report [R, k] int64 with the canvases of ``watched`` slots behind it: [R, k + c].

    Args:
        slots: of the step's R requests.
    """
    rows = [row for row, slot in enumerate(slots) if slot in watched]
    if not rows:
        return report
    canvases = take_snapshots(canvas, [slots[row] for row in rows])
    lines = torch.cat([upload(rows, torch.int64, report.device).unsqueeze(1), canvases], dim=1)
    numbers = torch.cat([upload([canvases.shape[1]], torch.int64, report.device), lines.flatten()])
    numbers = torch.nn.functional.pad(numbers, (0, -numbers.shape[0] % len(slots)), value=_NOTHING)
    return torch.cat([report, numbers.view(len(slots), -1)], dim=1)


def read_snapshots(numbers: Sequence[int]) -> dict[int, list[int]]:
    """What :func:`append_snapshots` appended, read line by line: the canvas of each watched row."""
    found: dict[int, list[int]] = {}
    width = numbers[0] if numbers else 0
    for start in range(1, len(numbers) - width, width + 1):
        row, *canvas = numbers[start : start + width + 1]
        if row == _NOTHING:
            break
        found[row] = canvas[: canvas.index(_NOTHING)] if _NOTHING in canvas else canvas
    return found


def pieces(canvas: Sequence[int], decode: Callable[[list[int]], str]) -> list[dict[str, Any]]:
    """A canvas as runs from left to right: ``{"text": ...}`` of tokens, ``{"masks": count}`` of masks."""
    runs = ((masked, list(run)) for masked, run in groupby(canvas, key=lambda token: token == MASKED))
    return [{"masks": len(run)} if masked else {"text": decode(run)} for masked, run in runs]
