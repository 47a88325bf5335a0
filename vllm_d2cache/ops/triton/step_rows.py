"""The rows of a step chosen and packed: a program a request, a stretch of its text at a time."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_d2cache.ops.step_rows import Choice, PackedRows
from vllm_d2cache.ops.triton.common import ALL_REGISTERS, STRETCH, as_bytes, kernel
from vllm_d2cache.ops.triton.packing import pack_line, sum_before

_FAR = tl.constexpr(1 << 30)  # behind any text
_ROWS = 256


@kernel()
def _choose_kernel(
    chosen,  # [R, T] bool, written
    candidates,  # [R, G] bool, written
    predicted,  # [R, G] bool, written
    sums,  # [2, R] int64, written
    slots,  # [R] int64
    refresh,  # [S, L] bool
    observe,  # [S, L] bool
    eligible,  # [S, L] bool
    integers,  # [10, R] int64
    masked,  # [R, G] bool
    live,  # [R, G] bool
    observes_all,  # [R] bool
    revises,  # [R] bool
    rows,
    table_width,
    num_positions,
    width,
    shift,
    ALL: tl.constexpr,
    REVISES: tl.constexpr,
    ORDERED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    line = tl.load(slots + row) * table_width
    prompt_len, canvas_len = tl.load(integers + row), tl.load(integers + rows + row)
    length, first = prompt_len + canvas_len, prompt_len - shift
    begin = tl.load(integers + 2 * rows + row)
    end = tl.minimum(begin + tl.load(integers + 5 * rows + row), canvas_len)
    run = tl.load(integers + 9 * rows + row)
    lead = tl.full((), _FAR, tl.int64)
    if ORDERED:
        for start in range(0, width, BLOCK):
            g = start + tl.arange(0, BLOCK)
            left = tl.load(masked + row * width + g, mask=g < width, other=0) != 0
            alive = tl.load(live + row * width + g, mask=g < width, other=0) != 0
            lead = tl.minimum(lead, tl.min(tl.where(left & alive, g, _FAR), 0))
        lead = tl.where(lead == _FAR, 0, lead)
        # Of others there is none.
        lead = tl.where(run > 0, lead, _FAR)
    count = tl.zeros((), tl.int64)
    for start in range(0, num_positions, BLOCK):
        at = start + tl.arange(0, BLOCK)
        now = (tl.load(refresh + line + at, mask=at < num_positions, other=0) != 0) & (at < length)
        if ORDERED:
            now = now | ((at == first + lead) & (lead < canvas_len))
        tl.store(chosen + row * num_positions + at, now.to(tl.int8), mask=at < num_positions)
        count += tl.sum((now & (at < num_positions)).to(tl.int64), 0)
    tl.store(sums + row, count)
    everything = tl.load(observes_all + row) != 0 if ALL else False
    again = tl.load(revises + row) != 0 if REVISES else False
    count = tl.zeros((), tl.int64)
    for start in range(0, width, BLOCK):
        g = start + tl.arange(0, BLOCK)
        there = (g < width) & (g < canvas_len)
        at = first + g
        read = (at >= 0) & (at < num_positions) & there
        computed = (tl.load(refresh + line + at, mask=read, other=0) != 0) & (at < length)
        left = tl.load(masked + row * width + g, mask=there, other=0) != 0
        alive = tl.load(live + row * width + g, mask=there, other=0) != 0
        inside = (g >= begin) & (g < end)
        may_go = inside & (tl.load(eligible + line + g, mask=there, other=0) != 0)
        if ORDERED:
            at_lead = g == lead
            computed = computed | (at_lead & read)
            may_go = (may_go & ((g < lead + run) | (run == 0))) | at_lead
        wanted = tl.load(observe + line + g, mask=there, other=0) != 0
        if ALL:
            wanted = wanted | everything
        predictable = computed & left & alive & there
        tl.store(candidates + row * width + g, (predictable & may_go).to(tl.int8), mask=g < width)
        taken = predictable & (may_go | wanted)
        if REVISES:
            taken = taken | (computed & inside & there & again)
        tl.store(predicted + row * width + g, taken.to(tl.int8), mask=g < width)
        count += tl.sum(taken.to(tl.int64), 0)
    tl.store(sums + rows + row, count)


def choose_rows(
    slots: torch.Tensor,
    refresh: torch.Tensor,
    observe: torch.Tensor,
    eligible: torch.Tensor,
    integers: torch.Tensor,
    masked: torch.Tensor,
    live: torch.Tensor,
    observes_all: torch.Tensor | None,
    revises: torch.Tensor | None,
    ordered: bool,
    shift: int,
    num_positions: int,
    told: bool = True,
    one_window: bool = False,
) -> Choice:
    """See ops.step_rows."""
    (rows, width), device = masked.shape, slots.device
    chosen = torch.empty(rows, num_positions, dtype=torch.bool, device=device)
    candidates, predicted = (torch.empty(rows, width, dtype=torch.bool, device=device) for _ in range(2))
    sums = torch.empty(2, rows, dtype=torch.int64, device=device)
    _choose_kernel[(rows,)](
        as_bytes(chosen),
        as_bytes(candidates),
        as_bytes(predicted),
        sums,
        slots,
        as_bytes(refresh),
        as_bytes(observe),
        as_bytes(eligible),
        integers,
        as_bytes(masked),
        as_bytes(live),
        as_bytes(masked if observes_all is None else observes_all),
        as_bytes(masked if revises is None else revises),
        rows,
        refresh.shape[1],
        num_positions,
        width,
        shift,
        ALL=observes_all is not None,
        REVISES=revises is not None,
        ORDERED=ordered,
        BLOCK=STRETCH,
        **ALL_REGISTERS,
    )
    return Choice(chosen, candidates, predicted, sums)


@kernel()
def _pack_kernel(
    request,  # [N] int64, written
    positions,  # [N] int64, written
    live,  # [N] bool, written
    input_ids,  # [N] int32, written
    row_of,  # [R, T] int64, written
    who,  # [n] int64, written
    slot_out,  # [n] int64, written
    logits_rows,  # [n] int64, written
    place,  # [R, G] int64, written
    slots,  # [R] int64
    chosen,  # [R, T] bool
    predicted,  # [R, G] bool
    counts,  # [2, R] int64
    tokens,  # [S, L] int32
    first,  # [R] int64
    rows,
    positions_wide,  # L
    num_positions,
    width,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    text = tokens + tl.load(slots + row) * positions_wide
    lane = tl.arange(0, BLOCK)
    start, room = sum_before(counts, row, BLOCK), tl.load(counts + row)
    marked = chosen + row * num_positions
    pack_line(request, positions, row_of, marked, row, start, room, num_positions, BLOCK)
    for begin in range(0, room, BLOCK):
        inside = begin + lane < room
        at = tl.load(positions + start + begin + lane, mask=inside, other=0)
        tl.store(live + start + begin + lane, (at >= 0).to(tl.int8), mask=inside)
        at = tl.maximum(at, 0)
        tl.store(positions + start + begin + lane, at, mask=inside)
        tl.store(input_ids + start + begin + lane, tl.load(text + at, mask=inside, other=0), mask=inside)
    start, room = sum_before(counts + rows, row, BLOCK), tl.load(counts + rows + row)
    pack_line(who, slot_out, place, predicted + row * width, row, start, room, width, BLOCK)
    from_position = tl.load(first + row)
    for begin in range(0, room, BLOCK):
        inside = begin + lane < room
        slot = tl.load(slot_out + start + begin + lane, mask=inside, other=0)
        at = tl.maximum(from_position + slot, 0)
        read = tl.load(row_of + row * num_positions + at, mask=inside, other=0)
        tl.store(logits_rows + start + begin + lane, tl.maximum(read, 0), mask=inside)
        tl.store(slot_out + start + begin + lane, tl.where(slot >= 0, slot, width), mask=inside)


def pack_rows(
    slots: torch.Tensor,
    chosen: torch.Tensor,
    predicted: torch.Tensor,
    counts: torch.Tensor,
    tokens: torch.Tensor,
    first: torch.Tensor,
    num_rows: int,
    num_predictions: int,
    exact: bool = False,
) -> PackedRows:
    """See ops.step_rows."""
    device, (rows, num_positions), width = slots.device, chosen.shape, predicted.shape[1]
    # Each by itself: the compiler looks at how pointers are aligned.
    request, positions = (torch.empty(num_rows, dtype=torch.int64, device=device) for _ in range(2))
    live = torch.empty(num_rows, dtype=torch.bool, device=device)
    input_ids = torch.empty(num_rows, dtype=torch.int32, device=device)
    row_of = torch.empty(rows, num_positions, dtype=torch.int64, device=device)
    who, slot, read = (torch.empty(num_predictions, dtype=torch.int64, device=device) for _ in range(3))
    place = torch.empty(rows, width, dtype=torch.int64, device=device)
    _pack_kernel[(rows,)](
        request,
        positions,
        as_bytes(live),
        input_ids,
        row_of,
        who,
        slot,
        read,
        place,
        slots,
        as_bytes(chosen),
        as_bytes(predicted),
        counts,
        tokens,
        first,
        rows,
        tokens.shape[1],
        num_positions,
        width,
        BLOCK=STRETCH // 2,  # 64-bit sums take registers
    )
    return PackedRows(request, positions, live, input_ids, row_of, who, slot, read, place)


@kernel()
def _store_kernel(
    kept_refresh,  # [S, L] bool, written
    kept_observe,  # [S, L] bool, written
    kept_eligible,  # [S, L] bool, written
    slots,  # [R] int64
    refresh,  # [R, T] bool
    observe,  # [R, G] bool
    candidates,  # [R, G] bool
    table_width,
    total,
    width,
    TOLD: tl.constexpr,
    CHOSEN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    line = tl.load(slots + row) * table_width
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    tl.store(kept_refresh + line + at, tl.load(refresh + row * total + at, mask=at < total, other=0), mask=at < total)
    if TOLD:
        own, there = row * width + at, at < width
        tl.store(kept_observe + line + at, tl.load(observe + own, mask=there, other=0), mask=there)
        may_go = tl.load(candidates + own, mask=there, other=0) if CHOSEN else tl.full((BLOCK,), 1, tl.uint8)
        tl.store(kept_eligible + line + at, may_go, mask=there)


def store_plan(
    slots: torch.Tensor,
    refresh: torch.Tensor,
    observe: torch.Tensor | None,
    candidates: torch.Tensor | None,
    tables: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
) -> None:
    """See ops.step_rows."""
    rows, total = refresh.shape
    told, observe = observe is not None, refresh if observe is None else observe
    _store_kernel[(rows, triton.cdiv(total, STRETCH))](
        *(table.view(torch.uint8) for table in tables),
        slots,
        as_bytes(refresh),
        as_bytes(observe),
        as_bytes(observe if candidates is None else candidates),
        tables[0].shape[1],
        total,
        observe.shape[1],
        TOLD=told,
        CHOSEN=candidates is not None,
        BLOCK=STRETCH,
    )


@kernel()
def _spread_kernel(
    scores,  # [R, G] float32, written
    tokens,  # [R, G] int32, written
    entropies,  # [R, G] float32, written
    predicted,  # [R, G] bool
    place,  # [R, G] int64
    score,  # [n] float32
    token,  # [n] int64
    entropy,  # [n] float32
    width,
    ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    g = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = g < width
    own = row * width + g
    taken = tl.load(predicted + own, mask=there, other=0) != 0
    at = tl.load(place + own, mask=taken, other=0)
    tl.store(scores + own, tl.load(score + at, mask=taken, other=0.0), mask=there)
    tl.store(tokens + own, tl.load(token + at, mask=taken, other=0).to(tl.int32), mask=there)
    if ENTROPY:
        tl.store(entropies + own, tl.load(entropy + at, mask=taken, other=0.0), mask=there)


def spread(
    predicted: torch.Tensor,
    place: torch.Tensor,
    score: torch.Tensor,
    token: torch.Tensor,
    entropy: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """See ops.step_rows."""
    (rows, width), device = predicted.shape, score.device
    scores = torch.empty(rows, width, device=device)
    tokens = torch.empty(rows, width, dtype=torch.int32, device=device)
    entropies = None if entropy is None else torch.empty(rows, width, device=device)
    _spread_kernel[(rows, triton.cdiv(width, _ROWS))](
        scores,
        tokens,
        scores if entropies is None else entropies,
        as_bytes(predicted),
        place.contiguous(),
        score.contiguous(),
        token.contiguous(),
        score if entropy is None else entropy.contiguous(),
        width,
        ENTROPY=entropy is not None,
        BLOCK=_ROWS,
    )
    return scores, tokens, entropies


@kernel()
def _page_slots_kernel(
    out,  # [N] int64, written
    table,  # [R, blocks] int
    request,  # [N] int64
    positions,  # [N] int64
    live,  # [N] bool
    count,
    stride_table,
    block_size: tl.constexpr,
    ROWS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < count
    used = (tl.load(live + row, mask=inside, other=0) != 0) & inside
    at = tl.load(positions + row, mask=used, other=0)
    line = tl.load(request + row, mask=used, other=0)
    block = tl.load(table + line * stride_table + at // block_size, mask=used, other=0).to(tl.int64)
    tl.store(out + row, tl.where(used, block * block_size + at % block_size, -1), mask=inside)


def page_slots(
    table: torch.Tensor,
    request: torch.Tensor,
    positions: torch.Tensor,
    live: torch.Tensor,
    block_size: int,
    exact: bool = False,
) -> torch.Tensor:
    """See ops.step_rows."""
    out = torch.empty_like(positions)
    count = positions.shape[0]
    if count:
        assert table.stride(1) == 1
        _page_slots_kernel[(triton.cdiv(count, _ROWS),)](
            out,
            table,
            request,
            positions,
            as_bytes(live),
            count,
            table.stride(0),
            block_size=block_size,
            ROWS=_ROWS,
        )
    return out
