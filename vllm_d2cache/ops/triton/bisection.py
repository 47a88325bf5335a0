"""The k best of a line without sorting it: bisection of the 32 bits of a float, then ties from the left."""

from __future__ import annotations

import triton
import triton.language as tl

# Of what is no candidate: below the key of every float.
NO_KEY = tl.constexpr(-(1 << 31))


@triton.jit
def ordered(x):
    """int32 in the order of the floats; -0 and 0 are the same."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return tl.where(bits >= 0, bits, bits ^ 0x7FFFFFFF)


@triton.jit
def score_of(key):
    """float32: what :func:`ordered` has made ``key`` of."""
    return tl.where(key >= 0, key, key ^ 0x7FFFFFFF).to(tl.float32, bitcast=True)


@triton.jit
def count_above(keys, width, key, BLOCK: tl.constexpr):
    """How many of a line's ``keys`` are greater than ``key``."""
    count = tl.zeros((), tl.int64)
    for start in range(0, width, BLOCK):
        at = start + tl.arange(0, BLOCK)
        found = tl.load(keys + at, mask=at < width, other=-(1 << 31))
        count += tl.sum((found > key).to(tl.int64), 0)
    return count


@triton.jit
def kth_key(keys, width, k, BLOCK: tl.constexpr):
    """The smallest int64 key that fewer than ``k`` keys of the line exceed: that of the k-th best, if there are k."""
    low = tl.full((), -(1 << 31), tl.int64)
    high = tl.full((), (1 << 31) - 1, tl.int64)
    while low < high:
        middle = (low + high) >> 1
        if count_above(keys, width, middle, BLOCK) < k:
            high = middle
        else:
            low = middle + 1
    return low


@triton.jit
def take_best(out, keys, width, k, BLOCK: tl.constexpr):
    """Write to ``out`` [width] bool which are the ``k`` greatest keys of the line; ties go to the lower place."""
    last = kth_key(keys, width, k, BLOCK)
    ties = k - count_above(keys, width, last, BLOCK)
    before = tl.zeros((), tl.int64)
    for start in range(0, width, BLOCK):
        at = start + tl.arange(0, BLOCK)
        key = tl.load(keys + at, mask=at < width, other=-(1 << 31))
        equal = (key == last) & (key != -(1 << 31))
        rank = before + tl.cumsum(equal.to(tl.int64), 0)
        best = (key > last) | (equal & (rank <= ties))
        tl.store(out + at, best.to(tl.int8), mask=at < width)
        before += tl.sum(equal.to(tl.int64), 0)
