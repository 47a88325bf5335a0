"""d2Cache's two stages: a program a request, which walks along its text; nothing is sorted (bisection.py)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_d2cache.ops.refresh_choice import Outcome
from vllm_d2cache.ops.triton.bisection import NO_KEY, ordered, score_of, take_best
from vllm_d2cache.ops.triton.common import ALL_REGISTERS, STRETCH, as_bytes, kernel

_FAR = tl.constexpr(1 << 29)  # behind any text, and twice that is a number of 32 bits
_WIDEST_GAP = tl.constexpr(1 << 20)


@kernel()
def _masked_kernel(
    out,  # [R, G] bool, written
    memory,  # [S, L] float32, written
    score,  # [R, G] float32, scratch
    keys,  # [R, G] int32, scratch
    slots,  # [R] int64
    latest,  # [S] int64
    current_k,  # [S] int64
    density,  # [R, G] float32
    integers,  # [10, R] int64
    masked,  # [R, G] bool
    live,  # [R, G] bool
    predicted,  # [R, G] bool
    confidence,  # [R, G] float32
    first,  # [R] bool
    window_start,  # [R] int64
    rows,
    table_width,
    width,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + row)
    own, line = row * width, slot * table_width
    canvas_len, length = tl.load(integers + rows + row), tl.load(integers + 5 * rows + row)
    k, begin = tl.load(current_k + slot), tl.load(window_start + row)
    begins = tl.load(first + row) != 0
    follows = begins | (tl.load(latest + slot) == 1)
    best = tl.zeros((), tl.float32)
    left, kth = tl.zeros((), tl.int64), tl.zeros((), tl.int64)
    for start in range(0, width, BLOCK):
        g = start + tl.arange(0, BLOCK)
        there, mine = g < width, (g < width) & (g < canvas_len)
        kept = tl.load(memory + line + g, mask=there, other=0.0)
        kept = tl.where(begins, 0.0, kept)
        update = (tl.load(predicted + own + g, mask=there, other=0) != 0) & follows
        kept = tl.where(update, tl.load(confidence + own + g, mask=there, other=0.0), kept)
        tl.store(memory + line + g, kept, mask=there)
        product = tl.where(mine, kept * tl.load(density + own + g, mask=there, other=0.0), 0.0)
        tl.store(score + own + g, product, mask=there)
        best = tl.maximum(best, tl.max(product, 0))
        open_slot = (tl.load(masked + own + g, mask=there, other=0) != 0) & (
            tl.load(live + own + g, mask=there, other=0) != 0
        )
        seen = left + tl.cumsum(open_slot.to(tl.int64), 0)
        kth += tl.sum(((seen < k) & there).to(tl.int64), 0)
        left += tl.sum(open_slot.to(tl.int64), 0)
    tl.debug_barrier()
    # The search window ends with the window that holds the k-th remaining slot.
    end = (tl.minimum(kth, width - 1) // length + 1) * length
    for start in range(0, width, BLOCK):
        g = start + tl.arange(0, BLOCK)
        there = g < width
        x = tl.load(score + own + g, mask=there, other=0.0)
        # A bonus of the best score puts the current window's slots before all others.
        x = x + tl.where((g >= begin) & (g < begin + length), best, 0.0)
        may_go = (tl.load(masked + own + g, mask=there, other=0) != 0) & (
            tl.load(live + own + g, mask=there, other=0) != 0
        )
        may_go = may_go & (g >= begin) & (g < end) & there
        tl.store(keys + own + g, tl.where(may_go, ordered(x), NO_KEY), mask=there)
    tl.debug_barrier()
    take_best(out + own, keys + own, width, k, BLOCK)


def select_masked(
    slots: torch.Tensor,
    memory: torch.Tensor,
    latest: torch.Tensor,
    current_k: torch.Tensor,
    density: torch.Tensor,
    integers: torch.Tensor,
    masked: torch.Tensor,
    live: torch.Tensor,
    outcome: Outcome,
    follows: bool = True,
    fresh: bool = True,
    one_window: bool = False,
) -> torch.Tensor:
    """See ops.refresh_choice."""
    (rows, width), device = masked.shape, slots.device
    out = torch.empty(rows, width, dtype=torch.bool, device=device)
    score = torch.empty(rows, width, device=device)
    keys = torch.empty(rows, width, dtype=torch.int32, device=device)
    _masked_kernel[(rows,)](
        as_bytes(out),
        memory,
        score,
        keys,
        slots,
        latest,
        current_k,
        density.contiguous(),
        integers,
        as_bytes(masked),
        as_bytes(live),
        as_bytes(outcome.predicted),
        outcome.score.contiguous(),
        as_bytes(outcome.first),
        outcome.window_start.contiguous(),
        rows,
        memory.shape[1],
        width,
        BLOCK=STRETCH,
        **ALL_REGISTERS,
    )
    return out


@triton.jit
def _mass_above(share, keys, total, key, BLOCK: tl.constexpr):
    """float64: sum of the shares whose keys are greater; rounded to float32 where it is compared, as in the twin."""
    mass = tl.zeros((), tl.float64)
    for start in range(0, total, BLOCK):
        at = start + tl.arange(0, BLOCK)
        above = tl.load(keys + at, mask=at < total, other=0) > key
        mass += tl.sum(tl.load(share + at, mask=above, other=0.0).to(tl.float64), 0)
    return mass


@triton.jit
def _later(a, b):
    return tl.maximum(a, b)


@triton.jit
def _sooner(a, b):
    return tl.minimum(a, b)


@kernel()
def _refresh_kernel(
    refresh,  # [R, T] bool, written
    observe,  # [R, G] bool, written
    share,  # [R, T] float32, scratch
    keys,  # [R, T] int32, scratch
    slots,  # [R] int64
    importance,  # [R, T] float32
    selected,  # [R, G] bool
    committed,  # [R, G] bool
    masked,  # [R, G] bool
    integers,  # [10, R] int64
    rollout_p,  # [S] float64
    inflate_w,  # [S] int64
    latest,  # [S] int64
    rows,
    stride_importance,
    total,
    width,
    shift,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + row)
    own, line = row * width, row * total
    prompt_len, canvas_len = tl.load(integers + row), tl.load(integers + rows + row)
    p = tl.load(rollout_p + slot).to(tl.float32)
    mass = tl.zeros((), tl.float64)
    for start in range(0, total, BLOCK):
        at = start + tl.arange(0, BLOCK)
        there = at < total
        g = at - prompt_len
        written = (g >= 0) & (g < canvas_len) & (g < width) & there
        read = (g + shift >= 0) & (g + shift < canvas_len) & (g + shift < width) & there
        certain = (tl.load(selected + own + g + shift, mask=read, other=0) != 0) | (
            tl.load(committed + own + g, mask=written, other=0) != 0
        )
        tl.store(refresh + line + at, certain.to(tl.int8), mask=there)
        counts = there & (g < canvas_len) & ((certain == 0) | (g < 0))
        x = tl.load(importance + row * stride_importance + at, mask=counts, other=0.0)
        tl.store(share + line + at, x, mask=there)
        mass += tl.sum(x.to(tl.float64), 0)
    tl.debug_barrier()
    norm = mass.to(tl.float32) + 1e-9
    top = tl.zeros((), tl.int32)
    for start in range(0, total, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = tl.div_rn(tl.load(share + line + at, mask=at < total, other=0.0), norm)
        key = ordered(x)
        tl.store(share + line + at, x, mask=at < total)
        tl.store(keys + line + at, key, mask=at < total)
        top = tl.maximum(top, tl.max(tl.where(at < total, key, 0), 0))
    tl.debug_barrier()
    # The smallest key above which there is no more than p; shares are not negative.
    low, high = tl.zeros((), tl.int32), top
    if p < 1:
        while low < high:
            middle = low + (high - low) // 2
            if _mass_above(share + line, keys + line, total, middle, BLOCK).to(tl.float32) <= p:
                high = middle
            else:
                low = middle + 1
    above = _mass_above(share + line, keys + line, total, low, BLOCK)
    value = score_of(low).to(tl.float64)
    ties = tl.zeros((), tl.int64)
    for start in range(0, total, BLOCK):
        at = start + tl.arange(0, BLOCK)
        there = at < total
        key = tl.load(keys + line + at, mask=there, other=0)
        equal = (key == low) & (key > 0) & there
        rank = ties + tl.cumsum(equal.to(tl.int64), 0)
        within = (above + rank.to(tl.float64) * value).to(tl.float32) <= p
        fits = equal & (within | ((low == top) & (rank == 1)))
        now = (tl.load(refresh + line + at, mask=there, other=0) != 0) | (key > low) | fits
        if shift > 0:
            # The last prompt position serves slot 0 alone.
            now = tl.where(at == prompt_len - 1, tl.load(selected + own) != 0, now)
        tl.store(refresh + line + at, now.to(tl.int8), mask=there)
        ties += tl.sum(equal.to(tl.int64), 0)
    tl.debug_barrier()
    gap = tl.minimum(tl.load(inflate_w + slot), _WIDEST_GAP)
    if gap > 1:
        before = tl.full((), -_FAR, tl.int32)
        for start in range(0, total, BLOCK):
            at = start + tl.arange(0, BLOCK)
            now = tl.load(refresh + line + at, mask=at < total, other=0) != 0
            last = tl.maximum(tl.associative_scan(tl.where(now, at, -_FAR), 0, _later), before)
            tl.store(keys + line + at, last, mask=at < total)
            before = tl.maximum(before, tl.max(tl.where(now, at, -_FAR), 0))
        tl.debug_barrier()
        after = tl.full((), _FAR, tl.int32)
        for i in range(0, tl.cdiv(total, BLOCK)):
            at = (tl.cdiv(total, BLOCK) - 1 - i) * BLOCK + tl.arange(0, BLOCK)
            now = tl.load(refresh + line + at, mask=at < total, other=0) != 0
            following = tl.minimum(tl.associative_scan(tl.where(now, at, _FAR), 0, _sooner, reverse=True), after)
            last = tl.load(keys + line + at, mask=at < total, other=0)
            tl.store(refresh + line + at, (now | (following - last <= gap)).to(tl.int8), mask=at < total)
            after = tl.minimum(after, tl.min(tl.where(now, at, _FAR), 0))
        tl.debug_barrier()
    watches = tl.load(latest + slot) == 1
    for start in range(0, width, BLOCK):
        g = start + tl.arange(0, BLOCK)
        at = prompt_len + g - shift
        read = (g < width) & (g < canvas_len) & (at >= 0) & (at < total)
        computed = tl.load(refresh + line + at, mask=read, other=0) != 0
        hidden = tl.load(masked + own + g, mask=read, other=0) != 0
        tl.store(observe + own + g, (computed & hidden & watches).to(tl.int8), mask=g < width)


def choose_refresh(
    slots: torch.Tensor,
    importance: torch.Tensor,
    selected: torch.Tensor,
    committed: torch.Tensor,
    masked: torch.Tensor,
    integers: torch.Tensor,
    rollout_p: torch.Tensor,
    inflate_w: torch.Tensor,
    latest: torch.Tensor,
    shift: int,
    inflates: bool = True,
    follows: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See ops.refresh_choice."""
    (rows, total), width, device = importance.shape, masked.shape[1], slots.device
    assert importance.stride(1) == 1
    refresh = torch.empty(rows, total, dtype=torch.bool, device=device)
    observe = torch.empty(rows, width, dtype=torch.bool, device=device)
    share = torch.empty(rows, total, device=device)
    keys = torch.empty(rows, total, dtype=torch.int32, device=device)
    _refresh_kernel[(rows,)](
        as_bytes(refresh),
        as_bytes(observe),
        share,
        keys,
        slots,
        importance,
        as_bytes(selected),
        as_bytes(committed),
        as_bytes(masked),
        integers,
        rollout_p,
        inflate_w,
        latest,
        rows,
        importance.stride(0),
        total,
        width,
        shift,
        BLOCK=STRETCH,
        **ALL_REGISTERS,
    )
    return refresh, observe
