"""Texts read, committed and handed out: a program a request, a stretch of its canvas at a time."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_d2cache.ops.texts import Committed, Edits, Texts
from vllm_d2cache.ops.triton.common import STRETCH, as_bytes, kernel

_FAR = tl.constexpr(1 << 30)  # behind any text


@triton.jit
def _end_of_block(end, prompt_len, block_length, BLOCKS: tl.constexpr):
    """First slot that is not live: behind the block of the first stop token, where texts are cut into blocks."""
    if BLOCKS:
        end = tl.where(end == _FAR, end, end + block_length - (prompt_len + end) % block_length)
    return end


@kernel()
def _read_kernel(
    integers,  # [10, R] int64, written
    floats,  # [3, R] float32, written
    masked_out,  # [R, G] bool, written
    live_out,  # [R, G] bool, written
    slots,  # [R] int64
    masked,  # [S, L] bool
    terminal,  # [S, L] bool
    counts,  # [7, S] int64
    numbers,  # [S, 8] float32
    rows,
    num_slots,
    table_width,
    width,
    block_length,
    BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + row)
    line = slot * table_width
    end = tl.full((), _FAR, tl.int64)
    for start in range(0, width, BLOCK):
        g = start + tl.arange(0, BLOCK)
        stop = tl.load(terminal + line + g, mask=g < width, other=0) != 0
        end = tl.minimum(end, tl.min(tl.where(stop, g, _FAR), 0))
    prompt_len = tl.load(counts + slot)
    end = _end_of_block(end, prompt_len, block_length, BLOCKS)
    first = tl.full((), _FAR, tl.int64)
    for start in range(0, width, BLOCK):
        g = start + tl.arange(0, BLOCK)
        flag = tl.load(masked + line + g, mask=g < width, other=0)
        tl.store(masked_out + row * width + g, flag, mask=g < width)
        tl.store(live_out + row * width + g, (g < end).to(tl.int8), mask=g < width)
        first = tl.minimum(first, tl.min(tl.where((flag != 0) & (g < end), g, _FAR), 0))
    first = tl.where(first == _FAR, 0, first)
    window = tl.load(numbers + slot * 8).to(tl.int64)
    begin = first - (first + (prompt_len if BLOCKS else 0)) % window
    held = tl.load(counts + 5 * num_slots + slot) > 0
    begin = tl.where(held, tl.load(counts + 6 * num_slots + slot), begin)
    tl.store(integers + row, prompt_len)
    tl.store(integers + rows + row, tl.load(counts + num_slots + slot))
    tl.store(integers + 2 * rows + row, begin)
    tl.store(integers + 3 * rows + row, tl.load(counts + 2 * num_slots + slot))
    tl.store(integers + 4 * rows + row, tl.load(counts + 3 * num_slots + slot))
    # Of OPTIONS, 2, 3 and 5 are FLOATS.
    tl.store(integers + 5 * rows + row, window)
    tl.store(integers + 6 * rows + row, tl.load(numbers + slot * 8 + 1).to(tl.int64))
    tl.store(integers + 7 * rows + row, tl.load(numbers + slot * 8 + 4).to(tl.int64))
    tl.store(integers + 8 * rows + row, tl.load(numbers + slot * 8 + 6).to(tl.int64))
    tl.store(integers + 9 * rows + row, tl.load(numbers + slot * 8 + 7).to(tl.int64))
    tl.store(floats + row, tl.load(numbers + slot * 8 + 2))
    tl.store(floats + rows + row, tl.load(numbers + slot * 8 + 3))
    tl.store(floats + 2 * rows + row, tl.load(numbers + slot * 8 + 5))


def read_texts(
    slots: torch.Tensor,
    masked: torch.Tensor,
    terminal: torch.Tensor,
    counts: torch.Tensor,
    numbers: torch.Tensor,
    width: int,
    block_length: int | None,
) -> Texts:
    """See ops.texts."""
    rows, device = slots.shape[0], slots.device
    integers = torch.empty(10, rows, dtype=torch.int64, device=device)
    floats = torch.empty(3, rows, device=device)
    left, live = (torch.empty(rows, width, dtype=torch.bool, device=device) for _ in range(2))
    _read_kernel[(rows,)](
        integers,
        floats,
        as_bytes(left),
        as_bytes(live),
        slots,
        as_bytes(masked),
        as_bytes(terminal),
        counts,
        numbers,
        rows,
        counts.shape[1],
        masked.shape[1],
        width,
        block_length or 0,
        BLOCKS=block_length is not None,
        BLOCK=STRETCH,
    )
    return Texts(integers, floats, left, live)


@kernel()
def _commit_kernel(
    after,  # [10, R] int64, written
    changes,  # [2, R] int64, written
    masked_out,  # [R, G] bool, written
    live_out,  # [R, G] bool, written
    tokens,  # [S, positions] int32, written
    masked,  # [S, L] bool, written
    terminal,  # [S, L] bool, written
    counts,  # [7, S] int64, written
    slots,  # [R] int64
    integers,  # [10, R] int64
    before,  # [R, G] bool
    committed,  # [R, G] bool
    token,  # [R, G] int32
    revoked,  # [R, G] bool
    revised,  # [R, G] bool
    held,  # [R] bool
    stop_ids,  # [S, num_stops] int32
    rows,
    num_slots,
    positions,
    table_width,
    width,
    num_stops,
    mask_token_id,
    block_length,
    REVOKES: tl.constexpr,
    REVISES: tl.constexpr,
    HOLDS: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + row)
    prompt_len, canvas_len = tl.load(integers + row), tl.load(integers + rows + row)
    line, own = slot * table_width, row * width
    text = tokens + slot * positions + prompt_len
    end = tl.full((), _FAR, tl.int64)
    commits, undone = tl.zeros((), tl.int64), tl.zeros((), tl.int64)
    for start in range(0, width, BLOCK):
        g = start + tl.arange(0, BLOCK)
        there, mine = g < width, (g < canvas_len) & (g < width)
        now = tl.load(committed + own + g, mask=there, other=0) != 0
        commits += tl.sum(now.to(tl.int64), 0)
        ended = tl.load(terminal + line + g, mask=there, other=0) != 0
        if REVISES:
            again = tl.load(revised + own + g, mask=there, other=0) != 0
            now = now | again
            ended = ended & (again == 0)
        written = tl.load(token + own + g, mask=there, other=0)
        tl.store(text + g, written, mask=now & mine)
        left = (tl.load(before + own + g, mask=there, other=0) != 0) & (now == 0)
        stop = tl.zeros((BLOCK,), tl.int32)
        for i in range(0, num_stops):
            stop = stop | (written == tl.load(stop_ids + slot * num_stops + i)).to(tl.int32)
        ends = ended | ((stop != 0) & now)
        if REVOKES:
            back = tl.load(revoked + own + g, mask=there, other=0) != 0
            tl.store(text + g, tl.zeros((BLOCK,), tl.int32) + mask_token_id, mask=back & mine)
            left = left | back
            ends = ends & (back == 0)
            undone += tl.sum(back.to(tl.int64), 0)
        tl.store(masked_out + own + g, left.to(tl.int8), mask=there)
        tl.store(masked + line + g, left.to(tl.int8), mask=there)
        tl.store(terminal + line + g, ends.to(tl.int8), mask=there)
        end = tl.minimum(end, tl.min(tl.where(ends & there, g, _FAR), 0))
    tl.debug_barrier()
    end = _end_of_block(end, prompt_len, block_length, BLOCKS)
    first = tl.full((), _FAR, tl.int64)
    for start in range(0, width, BLOCK):
        g = start + tl.arange(0, BLOCK)
        left = tl.load(masked_out + own + g, mask=g < width, other=0) != 0
        tl.store(live_out + own + g, (g < end).to(tl.int8), mask=g < width)
        first = tl.minimum(first, tl.min(tl.where(left & (g < end), g, _FAR), 0))
    first = tl.where(first == _FAR, 0, first)
    begin = first - (first + (prompt_len if BLOCKS else 0)) % tl.load(integers + 5 * rows + row)
    step = tl.load(integers + 3 * rows + row) + 1
    before_it = tl.load(integers + 2 * rows + row)
    if HOLDS:
        stays = tl.load(held + row) != 0
        begin = tl.where(stays, before_it, begin)
        tl.store(counts + 5 * num_slots + slot, stays.to(tl.int64))
        tl.store(counts + 6 * num_slots + slot, begin)
    same = begin == before_it
    window_step = tl.where(same, tl.load(integers + 4 * rows + row) + 1, 0)
    for i in tl.static_range(10):
        if i < 2 or i > 4:
            tl.store(after + i * rows + row, tl.load(integers + i * rows + row))
    tl.store(after + 2 * rows + row, begin)
    tl.store(after + 3 * rows + row, step)
    tl.store(after + 4 * rows + row, window_step)
    tl.store(counts + 2 * num_slots + slot, step)
    tl.store(counts + 3 * num_slots + slot, window_step)
    tl.store(changes + row, commits)
    tl.store(changes + rows + row, undone)


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
    """See ops.texts."""
    committed, token, revoked, revised, held = edits
    (rows, width), device = committed.shape, slots.device
    after = torch.empty_like(integers)
    changes = torch.empty(2, rows, dtype=torch.int64, device=device)
    left, live = (torch.empty(rows, width, dtype=torch.bool, device=device) for _ in range(2))
    _commit_kernel[(rows,)](
        after,
        changes,
        as_bytes(left),
        as_bytes(live),
        tokens,
        as_bytes(masked),
        as_bytes(terminal),
        counts,
        slots,
        integers,
        as_bytes(before),
        as_bytes(committed),
        token.contiguous(),
        as_bytes(committed if revoked is None else revoked),
        as_bytes(committed if revised is None else revised),
        as_bytes(committed if held is None else held),
        stop_ids,
        rows,
        counts.shape[1],
        tokens.shape[1],
        masked.shape[1],
        width,
        stop_ids.shape[1],
        mask_token_id,
        block_length or 0,
        REVOKES=revoked is not None,
        REVISES=revised is not None,
        HOLDS=held is not None,
        BLOCKS=block_length is not None,
        BLOCK=STRETCH // 2,  # or registers spill on sm_120
    )
    return Committed(after, (changes[0], changes[1]), left, live)


@kernel()
def _emit_kernel(
    handed,  # [R, G] int64, written
    fresh_out,  # [R] int32, written
    counts,  # [7, S] int64, written
    slots,  # [R] int64
    integers,  # [10, R] int64
    window_start,  # [R] int64
    masked,  # [R, G] bool
    live,  # [R, G] bool
    provisional,  # [R] bool
    held,  # [R] bool
    tokens,  # [S, positions] int32
    rows,
    num_slots,
    positions,
    width,
    KEEPS: tl.constexpr,
    HOLDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + row)
    prompt_len, canvas_len = tl.load(integers + row), tl.load(integers + rows + row)
    done = canvas_len
    still_open = tl.zeros((), tl.int32)
    for start in range(0, width, BLOCK):
        g = start + tl.arange(0, BLOCK)
        left = tl.load(masked + row * width + g, mask=g < width, other=0) != 0
        done = tl.minimum(done, tl.min(tl.where(left, g, _FAR), 0))
        if KEEPS:
            alive = tl.load(live + row * width + g, mask=g < width, other=0) != 0
            still_open += tl.sum((left & alive).to(tl.int32), 0)
    if KEEPS:
        unfinished = still_open > 0
        if HOLDS:
            unfinished = unfinished | (tl.load(held + row) != 0)
        kept = (tl.load(provisional + row) != 0) & unfinished
        done = tl.where(kept, tl.minimum(done, tl.load(window_start + row)), done)
    emitted = tl.load(counts + 4 * num_slots + slot)
    fresh = tl.maximum(done - emitted, 0)
    tl.debug_barrier()  # every thread reads what one of them writes
    tl.store(counts + 4 * num_slots + slot, emitted + fresh)
    tl.store(fresh_out + row, fresh.to(tl.int32))
    for start in range(0, width, BLOCK):
        g = start + tl.arange(0, BLOCK)
        at = prompt_len + tl.minimum(emitted + g, canvas_len - 1)
        value = tl.load(tokens + slot * positions + at, mask=g < width, other=0)
        tl.store(handed + row * width + g, value.to(tl.int64), mask=g < width)


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
    """See ops.texts."""
    provisional, held = keeps
    (rows, width), device = masked.shape, slots.device
    handed = torch.empty(rows, width, dtype=torch.int64, device=device)
    fresh = torch.empty(rows, dtype=torch.int32, device=device)
    _emit_kernel[(rows,)](
        handed,
        fresh,
        counts,
        slots,
        integers,
        window_start,
        as_bytes(masked),
        as_bytes(live),
        as_bytes(masked if provisional is None else provisional),
        as_bytes(masked if held is None else held),
        tokens,
        rows,
        counts.shape[1],
        tokens.shape[1],
        width,
        KEEPS=provisional is not None,
        HOLDS=held is not None,
        BLOCK=STRETCH,
    )
    return handed, fresh
