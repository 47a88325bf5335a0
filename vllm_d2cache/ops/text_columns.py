"""What follows from the lengths and windows of a batch alone: made once for a batch, as all its steps ask the same.

Ops read those few numbers on the host, where records are kept by them: another batch has other records. Tensors of a
record are shared and never written. Shapes: R rows (requests), T positions, G canvas slots.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, wraps
from operator import add
from typing import Concatenate, NamedTuple, ParamSpec, TypeVar

import torch

from vllm_d2cache.ops.columns import columns

# A record of more elements is made anew each time: what is kept must not grow with batch and text.
_MOST_ELEMENTS = 1 << 18
_RECORDS = 8

Ints = tuple[int, ...]
_P = ParamSpec("_P")
_T = TypeVar("_T")


def _kept(make: Callable[Concatenate[Ints, int, _P], _T]) -> Callable[Concatenate[Ints, int, _P], _T]:
    """Remember what ``make`` has made of numbers with R x width elements, unless that is a lot of memory."""
    remembered = lru_cache(maxsize=_RECORDS)(make)

    @wraps(make)
    def look_up(numbers: Ints, width: int, *args: _P.args, **kwargs: _P.kwargs) -> _T:
        if len(numbers) * width > _MOST_ELEMENTS:
            return make(numbers, width, *args, **kwargs)
        return remembered(numbers, width, *args, **kwargs)  # type: ignore[arg-type]  # all hashable

    return look_up


def _column(numbers: Ints, device: torch.device) -> torch.Tensor:
    """[R, 1] int64."""
    return torch.tensor(numbers, dtype=torch.int64, device=device).unsqueeze(1)


class SlotMap(NamedTuple):
    """Where canvas slots are among positions."""

    at: torch.Tensor  # [R, G] int64, a position; any for a slot that has none
    inside: torch.Tensor  # [R, G] bool, whether the slot is one of the row's and has a position


@_kept
def slot_map(first: Ints, width: int, length: Ints, num_positions: int, device: torch.device) -> SlotMap:
    """The ``width`` = G slots of rows whose slot 0 is at position ``first``, and that have ``length`` slots."""
    slot = columns(width, device)
    index = _column(first, device) + slot
    inside = (slot < _column(length, device)) & (index < num_positions)
    return SlotMap(index.clamp(max=num_positions - 1), inside)


class PositionMap(NamedTuple):
    """Where positions are among canvas slots."""

    at: torch.Tensor  # [R, T] int64, a slot; any for a position that has none
    inside: torch.Tensor  # [R, T] bool, whether the position is that of one of the row's slots


@_kept
def position_map(first: Ints, width: int, length: Ints, num_slots: int, device: torch.device) -> PositionMap:
    """The ``width`` = T positions of rows as of :func:`slot_map`, whose columns are ``num_slots`` = G."""
    index = columns(width, device) - _column(first, device)
    inside = (index >= 0) & (index < _column(length, device)) & (index < num_slots)
    return PositionMap(index.clamp(0, num_slots - 1), inside)


class TextColumns(NamedTuple):
    """The positions of texts."""

    inside: torch.Tensor  # [R, T] bool, one of the row's own
    behind_prompt: torch.Tensor  # [R, T] bool, none of the prompt
    last_of_prompt: torch.Tensor  # [R, 1] int64


@_kept
def text_columns(prompt_len: Ints, width: int, canvas_len: Ints, device: torch.device) -> TextColumns:
    """The ``width`` = T positions of texts of these lengths."""
    position, prompt = columns(width, device), _column(prompt_len, device)
    inside = position < _column(tuple(map(add, prompt_len, canvas_len)), device)
    return TextColumns(inside, position >= prompt, prompt - 1)


class CanvasCells(NamedTuple):
    """The slots of canvases in a table of texts, whose cells are counted as :func:`ops.columns.cells_of` does."""

    inside: torch.Tensor  # [R, G] bool, one of the row's own
    at: torch.Tensor  # [R, G] int64, cell; behind a canvas it goes on as far as the line does
    last: torch.Tensor  # [R, 1] int64, cell of the last slot


@_kept
def canvas_cells(
    prompt_len: Ints, width: int, canvas_len: Ints, lines: Ints, num_columns: int, device: torch.device
) -> CanvasCells:
    """The ``width`` = G slots of canvases of ``canvas_len`` slots behind prompts of ``prompt_len`` positions.

    Args:
        lines: of the table, that each text is in.
        num_columns: of the table.
    """
    slot, prompt, length = columns(width, device), _column(prompt_len, device), _column(canvas_len, device)
    begin = _column(lines, device) * num_columns
    position = (prompt + slot).clamp(max=num_columns - 1)
    return CanvasCells(slot < length, begin + position, begin + prompt + length - 1)


class WindowColumns(NamedTuple):
    """The slots of canvases beside a window of each."""

    in_canvas: torch.Tensor  # [R, G] bool, one of the row's own
    inside: torch.Tensor  # [R, G] bool, one of these that is in the window
    ones: torch.Tensor  # [R, G] float32, 1 in the window
    behind_start: torch.Tensor  # [R, G] bool, in it or behind it
    begin: torch.Tensor  # [R, G] int64, first slot of the slot's own window, as they are counted from slot 0


@_kept
def window_columns(start: Ints, width: int, length: Ints, canvas_len: Ints, device: torch.device) -> WindowColumns:
    """The ``width`` = G slots of canvases of ``canvas_len``; a window of ``length`` slots begins at slot ``start``."""
    slot, first, window = columns(width, device), _column(start, device), _column(length, device)
    behind_start = slot >= first
    in_window = behind_start & (slot < first + window)
    in_canvas, begin = slot < _column(canvas_len, device), slot - slot % window.clamp(min=1)
    return WindowColumns(in_canvas, in_canvas & in_window, in_window.float(), behind_start, begin)
