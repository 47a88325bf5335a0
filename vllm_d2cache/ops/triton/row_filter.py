"""Nucleus and top-k filters without a sort: a program for each row.

What is kept is a prefix of the descending order, ties by index, so it is everything above a threshold and the first few
equal to it; the threshold is found by bisection of the 32 bits of a float.

Sums over a row are added lane by lane in fp32, a lane being every BLOCK-th token, and the lanes in fp64 at the end.
Which thread holds a lane goes by the width of the logits' type, which mates of a request decide; so what is added in an
order that goes by threads is added in fp64, which rounding to fp32 hides. The statistics of a row
(ops/triton/row_stats.py) are the same whether they filter as they read or are handed logits that were filtered here.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_d2cache.ops.triton.common import kernel

# Not measured on a GPU yet.
BLOCK = 4096
LOWEST = tl.constexpr(-3.4028234663852886e38)
NONE = tl.constexpr(1 << 30)


@triton.jit
def ordered(x):
    """int32 in the order of the floats; -0 and 0 are the same."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return tl.where(bits >= 0, bits, bits ^ 0x7FFFFFFF)


@triton.jit
def at_temperature(x, temperature):
    """x / temperature, rounded as PyTorch does it where edits come first; None = 1."""
    return x if temperature is None else tl.div_rn(x, temperature)


@triton.jit
def load(line, j, vocab, temperature):
    """Logits of one tile in fp32, at their temperature; -inf past the vocabulary."""
    x = tl.load(line + j, mask=j < vocab, other=float("-inf")).to(tl.float32)
    return at_temperature(x, temperature)


@triton.jit
def add(lane_top, lane_sum, x):
    """Maximum and sum of each lane with one more logit: each relative to its own maximum."""
    new_top = tl.maximum(lane_top, x)
    return new_top, lane_sum * tl.exp(lane_top - new_top) + tl.exp(x - new_top)


@triton.jit
def total_of(lane_top, lane_sum, top):
    """The lanes together, relative to ``top``."""
    return tl.sum((lane_sum * tl.exp(lane_top - top)).to(tl.float64), 0).to(tl.float32)


@triton.jit
def read_row(line, vocab, temperature, mask_token, MARGIN: tl.constexpr, BLOCK: tl.constexpr):
    """One pass: maximum, sum, best token but the mask and its logit; two best logits of each lane, with MARGIN."""
    lane = tl.arange(0, BLOCK)
    # Each lane keeps its own maximum, sum and best token; they meet once at the end.
    lane_top = tl.full([BLOCK], LOWEST, tl.float32)
    lane_sum = tl.zeros([BLOCK], tl.float32)
    first = tl.full([BLOCK], float("-inf"), tl.float32)
    second = tl.full([BLOCK], float("-inf"), tl.float32)
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    best_at = lane
    for start in range(0, vocab, BLOCK):
        j = start + lane
        x = load(line, j, vocab, temperature)
        lane_top, lane_sum = add(lane_top, lane_sum, x)
        if MARGIN:
            second = tl.maximum(second, tl.minimum(first, x))
            first = tl.maximum(first, x)
        better = (x > best) & (j != mask_token)
        best = tl.where(better, x, best)
        best_at = tl.where(better, j, best_at)
    top = tl.max(lane_top, 0)
    best_value = tl.max(best, 0)
    token = tl.min(tl.where(best == best_value, best_at, NONE), 0)
    return top, total_of(lane_top, lane_sum, top), best_value, token, first, second


@triton.jit
def _above(line, threshold, vocab, temperature, top, BLOCK: tl.constexpr):
    """Mass (relative to the maximum's) and number of the tokens above the threshold."""
    lane_mass = tl.zeros([BLOCK], tl.float32)
    lane_count = tl.zeros([BLOCK], tl.int32)
    for start in range(0, vocab, BLOCK):
        j = start + tl.arange(0, BLOCK)
        x = load(line, j, vocab, temperature)
        above = (ordered(x) > threshold) & (j < vocab)
        lane_mass += tl.where(above, tl.exp(x - top), 0.0)
        lane_count += above.to(tl.int32)
    return tl.sum(lane_mass.to(tl.float64), 0), tl.sum(lane_count, 0)


@triton.jit
def _threshold(line, vocab, temperature, top, total, top_p, top_k, BLOCK: tl.constexpr):
    """(threshold, cutoff): kept is what lies above the threshold, and what equals it up to index ``cutoff``."""
    # Off means more than there is.
    mass_limit = tl.where(top_p >= 1.0, 2.0 * total.to(tl.float64), top_p.to(tl.float64) * total)
    count_limit = tl.where(top_k > 0, top_k, vocab + 1)
    low = ordered(tl.full((), float("-inf"), tl.float32)).to(tl.int64)
    high = ordered(top).to(tl.int64)
    # The smallest key whose token still is kept: less than top_p before it, and fewer than top_k tokens.
    while low < high:
        middle = (low + high) >> 1
        mass, count = _above(line, middle, vocab, temperature, top, BLOCK)
        if (mass <= mass_limit) & (count < count_limit):
            high = middle
        else:
            low = middle + 1
    threshold = low.to(tl.int32)
    mass, count = _above(line, threshold, vocab, temperature, top, BLOCK)
    bits = tl.where(threshold >= 0, threshold, threshold ^ 0x7FFFFFFF)
    weight = tl.exp(bits.to(tl.float32, bitcast=True) - top).to(tl.float64)
    by_mass = tl.floor((mass_limit - mass) / tl.maximum(weight, 1e-300)) + 1.0
    allowed = tl.minimum(by_mass, (count_limit - count).to(tl.float64))
    allowed = tl.minimum(allowed, vocab.to(tl.float64)).to(tl.int32)
    seen = tl.zeros((), tl.int32)
    cutoff = tl.full((), -1, tl.int32)
    for start in range(0, vocab, BLOCK):
        j = start + tl.arange(0, BLOCK)
        equal = (ordered(load(line, j, vocab, temperature)) == threshold) & (j < vocab)
        rank = seen + tl.cumsum(equal.to(tl.int32), 0)
        cutoff = tl.maximum(cutoff, tl.max(tl.where(equal & (rank <= allowed), j, -1), 0))
        seen += tl.sum(equal.to(tl.int32), 0)
    return threshold, cutoff


@triton.jit
def bounds(line, vocab, temperature, top, total, best_value, token, mask_token, top_p, top_k, BLOCK: tl.constexpr):
    """(threshold, cutoff, spared) of what is kept, for ``is_kept``; spared: a token that is, whatever they say."""
    of_mask = at_temperature(tl.load(line + mask_token).to(tl.float32), temperature)
    mask_leads = (of_mask > best_value) | ((of_mask == best_value) & (mask_token < token))
    threshold, cutoff = _threshold(line, vocab, temperature, top, total, top_p, top_k, BLOCK)
    return threshold, cutoff, tl.where(mask_leads, token, -1)


@triton.jit
def is_kept(x, j, threshold, cutoff, spared):
    """Which of the logits x of tokens j a filter keeps."""
    key = ordered(x)
    return (key > threshold) | ((key == threshold) & (j <= cutoff)) | (j == spared)


@kernel("logits stride vocab")
def _filter_kernel(
    logits,  # [m, vocab] float32, written
    top_p_in,  # [m] float32
    top_k_in,  # [m] int64
    stride,
    vocab,
    mask_token,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    line = logits + row * stride
    top_p = tl.load(top_p_in + row)
    top_k = tl.load(top_k_in + row).to(tl.int32)
    if (top_p < 1.0) | (top_k > 0):
        top, total, best_value, token, _, _ = read_row(line, vocab, None, mask_token, False, BLOCK)
        threshold, cutoff, spared = bounds(
            line, vocab, None, top, total, best_value, token, mask_token, top_p, top_k, BLOCK
        )
        tl.debug_barrier()  # all threads have read the row
        for start in range(0, vocab, BLOCK):
            j = start + tl.arange(0, BLOCK)
            dropped = ~is_kept(load(line, j, vocab, None), j, threshold, cutoff, spared)
            tl.store(line + j, LOWEST, mask=dropped & (j < vocab))


def filter_logits(logits: torch.Tensor, top_p: torch.Tensor, top_k: torch.Tensor, mask_token_id: int) -> None:
    """See ops.row_filter."""
    rows, vocab = logits.shape
    if not rows:
        return
    assert logits.stride(1) == 1 and logits.dtype == torch.float32
    _filter_kernel[(rows,)](
        logits,
        top_p.contiguous(),
        top_k.contiguous(),
        logits.stride(0),
        vocab,
        mask_token_id,
        BLOCK=min(BLOCK, triton.next_power_of_2(vocab)),
        num_warps=8,
    )
