"""The texts of a step read from the tables of all slots, written back after the commits, and handed out.

Shapes: S slots, L positions at most, R rows (requests in this step), T positions, G canvas slots.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch

from vllm_d2cache.ops.columns import columns, lines_of, numbers_of, part_of, write_lines, zeros
from vllm_d2cache.ops.dispatch import dispatched
from vllm_d2cache.ops.text_columns import canvas_cells

_TRITON = "vllm_d2cache.ops.triton.texts"
# Columns of the tables, in order. Kernels know them by number.
# Held is 1 where a window is not over though it is full; held_start is where that begins.
COUNTS = ("prompt_len", "canvas_len", "step", "window_step", "emitted", "held", "held_start")
OPTIONS = ("window", "tokens_per_step", "threshold", "factor", "score", "sigma", "steps", "longest_run")
FLOATS = ("threshold", "factor", "sigma")
_STATE = ("prompt_len", "canvas_len", "window_start", "step", "window_step")
INTEGERS = (*_STATE, *(name for name in OPTIONS if name not in FLOATS))
_WHOLE, _BROKEN = ([OPTIONS.index(name) for name in OPTIONS if (name in FLOATS) == broken] for broken in (False, True))


class Texts(NamedTuple):
    """The texts of R rows; canvas.view says what the columns mean."""

    integers: torch.Tensor  # [10, R] int64: INTEGERS
    floats: torch.Tensor  # [3, R] float32: FLOATS
    masked: torch.Tensor  # [R, G] bool, canvas slots that still hold the mask
    live: torch.Tensor  # [R, G] bool, canvas slots before the first committed stop token


class Committed(NamedTuple):
    """The texts of R rows after their commits."""

    integers: torch.Tensor  # [10, R] int64
    changes: tuple[torch.Tensor, torch.Tensor]  # [R] int64 each: commits, and slots masked again
    masked: torch.Tensor  # [R, G] bool
    live: torch.Tensor  # [R, G] bool


class Edits(NamedTuple):
    """What a step does to texts."""

    committed: torch.Tensor  # [R, G] bool, masks that become tokens
    token: torch.Tensor  # [R, G] int32, what is written where ``committed`` or ``revised``
    revoked: torch.Tensor | None  # [R, G] bool, tokens that are masked again; None = none
    revised: torch.Tensor | None  # [R, G] bool, slots without a mask that are written over; None = none
    held: torch.Tensor | None  # [R] bool, whose window is not over even if it is full; None = nobody's


def live_slots(
    terminal: torch.Tensor, prompt_len: torch.Tensor | None = None, block_length: int | None = None
) -> torch.Tensor:
    """[R, G] bool: slots before the first of ``terminal`` [R, G] bool, which hold committed stop tokens.

    Where the text is cut into blocks behind a prompt of ``prompt_len`` [R], the rest of that one's block lives, too:
    its rows see each other, and are all to be filled.
    """
    if block_length is None:
        return terminal.cumsum(1) == 0
    assert prompt_len is not None
    width = terminal.shape[1]
    first = torch.where(terminal.any(1), terminal.to(torch.int8).argmax(1), width)
    behind = first + block_length - (prompt_len + first) % block_length
    return columns(width, terminal.device) < behind.unsqueeze(1)


def first_window(
    masked: torch.Tensor, live: torch.Tensor, window: torch.Tensor, before: torch.Tensor | None = None
) -> torch.Tensor:
    """[R] int64: start of the window with the first masked live slot, as windows fill up from left to right.

    Args:
        masked, live: [R, G] bool.
        window: [R] int64, its length.
        before: [R] int64, positions before the canvas from which windows are counted; None = none.
    """
    first = (masked & live).max(1).indices  # the leftmost of equals
    return first - (first if before is None else first + before) % window


def _windows(
    masked: torch.Tensor, terminal: torch.Tensor, prompt_len: torch.Tensor, window: torch.Tensor, block: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Live slots [R, G], and the start of the current window [R]."""
    live = live_slots(terminal, prompt_len, block)
    return live, first_window(masked, live, window, None if block is None else prompt_len)


@dispatched(_TRITON)
def read_texts(
    slots: torch.Tensor,
    masked: torch.Tensor,
    terminal: torch.Tensor,
    counts: torch.Tensor,
    numbers: torch.Tensor,
    width: int,
    block_length: int | None,
) -> Texts:
    """The texts of ``slots`` as they are now, padded to ``width`` canvas slots.

    Args:
        slots: [R] int64.
        masked, terminal: [S, L] bool, by canvas slot.
        counts: [7, S] int64, COUNTS.
        numbers: [S, 8] float32, OPTIONS.
        block_length: positions of a block where texts are cut into blocks, and windows with them; None = they are not.
    """
    masked, terminal = lines_of(masked, slots, width), lines_of(terminal, slots, width)
    options = numbers[slots].t()
    integers = options[_WHOLE].long()
    lengths = counts[:4, slots]
    held, held_start = counts[5:, slots]
    live, start = _windows(masked, terminal, lengths[0], integers[0], block_length)
    start = torch.where(held > 0, held_start, start).unsqueeze(0)
    return Texts(torch.cat([lengths[:2], start, lengths[2:], integers]), options[_BROKEN], masked, live)


@dispatched(_TRITON)
def commit_texts(
    slots: torch.Tensor,
    integers: torch.Tensor,
    before: torch.Tensor,
    edits: Edits,
    tokens: torch.Tensor,
    masked: torch.Tensor,
    terminal: torch.Tensor,
    counts: torch.Tensor,
    stop_ids: torch.Tensor,
    mask_token_id: int,
    num_positions: int,
    block_length: int | None,
    one_window: bool = False,
) -> Committed:
    """Write the committed tokens, mask the revoked ones, and count the step, in the tables of all slots.

    Args:
        slots: [R] int64.
        integers: [10, R] int64, of the texts before (Texts).
        before: [R, G] bool, masks before.
        tokens: [S, L + 1] int32 by position, the last of which no text has; written.
        masked, terminal: [S, L] bool by canvas slot; written.
        counts: [7, S] int64, COUNTS; steps are written.
        stop_ids: [S, n] int32, -1 where there is none.
        num_positions: T.
        block_length: as for :func:`read_texts`.
        one_window: the window of each of these texts is its whole canvas. A kernel asks each one's window anyway.
    """
    prompt_lens, canvas_lens, *_ = numbers_of(integers)
    committed, token, revoked, revised, held = edits
    lengths = (prompt_lens, committed.shape[1], canvas_lens)
    cells = canvas_cells(*lengths, numbers_of(slots), tokens.shape[1], slots.device)
    commits, undone = committed.sum(1), zeros(slots.shape[0], slots.device)
    terminal_before = lines_of(terminal, slots, committed.shape[1])
    if revised is not None:
        committed, terminal_before = committed | revised, terminal_before & ~revised
    # Columns behind a canvas keep what stands there. Some end in the last column, which is no position of a text.
    text = torch.where(committed & cells.inside, token, tokens.take(cells.at))
    left = before > committed  # of two flags the one is greater where it alone is True
    ends = terminal_before | (_stops(token, stop_ids.index_select(0, slots)) & committed)
    if revoked is not None:
        text = text.masked_fill(revoked & cells.inside, mask_token_id)
        left |= revoked
        ends &= ~revoked
        undone = revoked.sum(1)
    after = integers + _step_more(integers.device)
    if one_window and held is None:  # it begins at slot 0, before and after
        live = live_slots(ends)
    else:
        live = _go_on(slots, after, left, ends, held, counts, block_length)
    tokens.put_(cells.at, text)
    write_lines(masked, slots, left)
    write_lines(terminal, slots, ends)
    part_of(counts, slice(2, 4)).index_copy_(1, slots, after[3:5])
    return Committed(after, (commits, undone), left, live)


def _go_on(
    slots: torch.Tensor,
    after: torch.Tensor,
    left: torch.Tensor,
    ends: torch.Tensor,
    held: torch.Tensor | None,
    counts: torch.Tensor,
    block_length: int | None,
) -> torch.Tensor:
    """[R, G] bool, live slots; the window and its step are written into ``after`` [10, R] int64, Texts.integers.

    Args:
        left, ends: [R, G] bool, masks and stop tokens after the commits.
    """
    prompt_len, _, window_start, _, window_step, window, *_ = after.unbind()
    live, start = _windows(left, ends, prompt_len, window, block_length)
    if held is not None:
        start = torch.where(held, window_start, start)
        counts[5, slots], counts[6, slots] = held.long(), start
    window_step.mul_(start == window_start)  # from 0 where a window begins
    window_start.copy_(start)
    return live


def _stops(token: torch.Tensor, stop_ids: torch.Tensor) -> torch.Tensor:
    """[R, G] bool: whether ``token`` [R, G] is one of the line's ``stop_ids`` [R, n]."""
    if stop_ids.shape[1] == 1:
        return token == stop_ids
    return (token.unsqueeze(2) == stop_ids.unsqueeze(1)).any(2)


@lru_cache(maxsize=8)
def _step_more(device: torch.device) -> torch.Tensor:
    """[10, 1] int64: what is added to INTEGERS where a step goes on in its window. Shared: it is never written."""
    return torch.tensor([[int(name in ("step", "window_step"))] for name in INTEGERS], device=device)


@dispatched(_TRITON)
def emit_texts(
    slots: torch.Tensor,
    integers: torch.Tensor,
    window_start: torch.Tensor,
    masked: torch.Tensor,
    live: torch.Tensor,
    keeps: tuple[torch.Tensor | None, torch.Tensor | None],
    tokens: torch.Tensor,
    counts: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Hand out the newly contiguous tokens from the left: [R, G] int64 left-aligned, and [R] int32 how many.

    Args:
        slots: [R] int64.
        integers: [10, R] int64 (Texts).
        window_start: [R] int64, of the window after the commits.
        masked, live: [R, G] bool, after the commits.
        keeps: [R] bool each: tokens of the current window may be taken back and are kept until it is over; it is not
            over even if it is full. None = nobody's.
        tokens: [S, L] int32 by position.
        counts: [7, S] int64, COUNTS; what is emitted is written.
    """
    prompt_len, canvas_len, *_ = numbers_of(integers)
    lengths = (prompt_len, masked.shape[1], canvas_len)
    cells = canvas_cells(*lengths, numbers_of(slots), tokens.shape[1], masked.device)
    # Slots of the canvas with no mask up to there: the number of masks is less than True there alone.
    done = (masked.cumsum(1) < cells.inside).sum(1)
    provisional, held = keeps
    if provisional is not None:
        unfinished = (masked & live).any(1)
        unfinished = unfinished if held is None else unfinished | held
        done = torch.where(unfinished & provisional, torch.minimum(done, window_start), done)
    emitted_of = part_of(counts, 4)
    emitted = emitted_of.index_select(0, slots)
    done = torch.maximum(done, emitted)
    # Whatever stands behind the fresh ones: nobody reads it.
    handed = tokens.take(torch.minimum(cells.at + emitted.unsqueeze(1), cells.last))
    emitted_of.index_copy_(0, slots, done)
    return handed.long(), (done - emitted).int()
