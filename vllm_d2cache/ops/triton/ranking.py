"""Commits chosen by score: a program a request."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_d2cache.ops.triton.bisection import NO_KEY, count_above, ordered, score_of, take_best
from vllm_d2cache.ops.triton.common import ALL_REGISTERS, STRETCH, as_bytes, kernel

_FAR = tl.constexpr(1 << 30)  # behind any text


@triton.jit
def _factor_count(keys, width, candidates, factor, BLOCK: tl.constexpr):
    """See ops.ranking. What the rule asks grows with the rank, so the first that stops it is found by bisection."""
    low = tl.full((), -(1 << 31) + 1, tl.int64)
    high = tl.full((), (1 << 31) - 1, tl.int64)
    # The greatest key down to which some candidate stops the rule; the worst of those is the first to do so.
    while low < high:
        middle = (low + high + 1) >> 1
        count, worst = tl.zeros((), tl.int64), tl.full((), (1 << 31) - 1, tl.int64)
        for start in range(0, width, BLOCK):
            at = start + tl.arange(0, BLOCK)
            key = tl.load(keys + at, mask=at < width, other=NO_KEY).to(tl.int64)
            count += tl.sum((key >= middle).to(tl.int64), 0)
            worst = tl.minimum(worst, tl.min(tl.where(key >= middle, key, (1 << 31) - 1), 0))
        stops = (count + 1).to(tl.float32) * (1 - score_of(worst.to(tl.int32))) >= factor
        if (count > 0) & stops:
            low = middle
        else:
            high = middle - 1
    above = count_above(keys, width, low, BLOCK)
    first = tl.full((), _FAR, tl.int64)
    before = tl.zeros((), tl.int64)
    for start in range(0, width, BLOCK):
        at = start + tl.arange(0, BLOCK)
        key = tl.load(keys + at, mask=at < width, other=NO_KEY)
        equal = (key == low) & (key != NO_KEY)
        rank = above + before + tl.cumsum(equal.to(tl.int64), 0)
        stops = equal & ((rank + 1).to(tl.float32) * (1 - score_of(key)) >= factor)
        first = tl.minimum(first, tl.min(tl.where(stops, rank, _FAR), 0))
        before += tl.sum(equal.to(tl.int64), 0)
    return tl.where(first == _FAR, candidates, first) - 1


@kernel()
def _choose_kernel(
    out,  # [R, G] bool, written
    keys,  # [R, G] int32, scratch
    score,  # [R, G] float32
    candidates,  # [R, G] bool
    least,  # [R] int64
    threshold,  # [R] float32
    factor,  # [R] float32
    width,
    THRESHOLD: tl.constexpr,
    FACTOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    own = row * width
    count = tl.load(least + row)
    total, over = tl.zeros((), tl.int64), tl.zeros((), tl.int64)
    limit = tl.load(threshold + row) if THRESHOLD else 0.0
    for start in range(0, width, BLOCK):
        at = start + tl.arange(0, BLOCK)
        may_go = tl.load(candidates + own + at, mask=at < width, other=0) != 0
        x = tl.load(score + own + at, mask=may_go, other=0.0)
        tl.store(keys + own + at, tl.where(may_go, ordered(x), NO_KEY), mask=at < width)
        total += tl.sum(may_go.to(tl.int64), 0)
        if THRESHOLD:
            over += tl.sum((may_go & (x >= limit)).to(tl.int64), 0)
    tl.debug_barrier()
    if THRESHOLD:
        count = tl.where(limit > 0, tl.maximum(count, over), count)
    if FACTOR:
        most = tl.load(factor + row)
        if most > 0:
            count = tl.maximum(count, _factor_count(keys + own, width, total, most, BLOCK))
    take_best(out + own, keys + own, width, count, BLOCK)


def choose_commits(
    score: torch.Tensor,
    candidates: torch.Tensor,
    least: torch.Tensor,
    threshold: torch.Tensor | None,
    factor: torch.Tensor | None,
    single: bool = False,
) -> torch.Tensor:
    """See ops.ranking."""
    rows, width = score.shape
    out = torch.empty(rows, width, dtype=torch.bool, device=score.device)
    keys = torch.empty(rows, width, dtype=torch.int32, device=score.device)
    _choose_kernel[(rows,)](
        as_bytes(out),
        keys,
        score.contiguous(),
        as_bytes(candidates),
        least.contiguous(),
        (score if threshold is None else threshold).contiguous(),
        (score if factor is None else factor).contiguous(),
        width,
        THRESHOLD=threshold is not None,
        FACTOR=factor is not None,
        BLOCK=STRETCH,
        **ALL_REGISTERS,
    )
    return out


@triton.jit
def _later(a, b):
    return tl.maximum(a, b)


@triton.jit
def _entropy_above(keys, entropy, width, key, BLOCK: tl.constexpr):
    """float64 sum and maximum of the entropies whose keys are greater."""
    mass, most = tl.zeros((), tl.float64), tl.zeros((), tl.float64)
    for start in range(0, width, BLOCK):
        at = start + tl.arange(0, BLOCK)
        above = tl.load(keys + at, mask=at < width, other=NO_KEY) > key
        x = tl.load(entropy + at, mask=above & (at < width), other=0.0).to(tl.float64)
        mass += tl.sum(x, 0)
        most = tl.maximum(most, tl.max(x, 0))
    return mass, most


@kernel()
def _entropy_kernel(
    out,  # [R, G] bool, written
    keys,  # [R, G] int32, scratch
    score,  # [R, G] float32
    candidates,  # [R, G] bool
    least,  # [R] int64
    entropy,  # [R, G] float32
    gamma,  # [R] float32
    width,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    own = row * width
    limit = tl.load(gamma + row).to(tl.float64)
    for start in range(0, width, BLOCK):
        at = start + tl.arange(0, BLOCK)
        may_go = tl.load(candidates + own + at, mask=at < width, other=0) != 0
        x = tl.load(score + own + at, mask=may_go, other=0.0)
        tl.store(keys + own + at, tl.where(may_go, ordered(x), NO_KEY), mask=at < width)
    tl.debug_barrier()
    # The excess grows with the rank: the smallest key above which there is no more than gamma of it.
    low = tl.full((), -(1 << 31), tl.int64)
    high = tl.full((), (1 << 31) - 1, tl.int64)
    while low < high:
        middle = (low + high) >> 1
        mass, most = _entropy_above(keys + own, entropy + own, width, middle, BLOCK)
        if mass - most <= limit:
            high = middle
        else:
            low = middle + 1
    mass, most = _entropy_above(keys + own, entropy + own, width, low, BLOCK)
    count = count_above(keys + own, width, low, BLOCK)
    for start in range(0, width, BLOCK):
        at = start + tl.arange(0, BLOCK)
        key = tl.load(keys + own + at, mask=at < width, other=NO_KEY)
        equal = (key == low) & (key != NO_KEY)
        x = tl.where(equal, tl.load(entropy + own + at, mask=equal, other=0.0).to(tl.float64), 0.0)
        run = mass + tl.cumsum(x, 0)
        peak = tl.maximum(tl.associative_scan(x, 0, _later), most)
        count += tl.sum((equal & (run - peak <= limit)).to(tl.int64), 0)
        mass += tl.sum(x, 0)
        most = tl.maximum(most, tl.max(x, 0))
    take_best(out + own, keys + own, width, tl.maximum(count, tl.load(least + row)), BLOCK)


def choose_by_entropy(
    score: torch.Tensor, candidates: torch.Tensor, least: torch.Tensor, entropy: torch.Tensor, gamma: torch.Tensor
) -> torch.Tensor:
    """See ops.ranking."""
    rows, width = score.shape
    out = torch.empty(rows, width, dtype=torch.bool, device=score.device)
    keys = torch.empty(rows, width, dtype=torch.int32, device=score.device)
    _entropy_kernel[(rows,)](
        as_bytes(out),
        keys,
        score.contiguous(),
        as_bytes(candidates),
        least.contiguous(),
        entropy.contiguous(),
        gamma.contiguous(),
        width,
        BLOCK=STRETCH,
        **ALL_REGISTERS,
    )
    return out
