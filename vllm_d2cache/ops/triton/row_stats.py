"""Row statistics in tiles of the vocabulary: a program for each row, nothing of the size of the logits but the logits.

One pass gives maximum, normaliser, best token and the two best values. A nucleus or top-k filter needs no sort: what
is kept is a prefix of the descending order, ties by index, so it is everything above a threshold and the first few
equal to it; the threshold is found by bisection of the 32 bits of a float. Sampling inverts the same cumulative
distribution as the twin, in the order of the vocabulary and in fp64.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_d2cache.ops.row_stats import RowParams, RowStats
from vllm_d2cache.ops.triton.common import kernel

# Not measured on a GPU yet.
BLOCK = 4096
_LOWEST = tl.constexpr(-3.4028234663852886e38)
_NONE = tl.constexpr(1 << 30)


@triton.jit
def _ordered(x):
    """int32 in the order of the floats; -0 and 0 are the same."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return tl.where(bits >= 0, bits, bits ^ 0x7FFFFFFF)


@triton.jit
def _at_temperature(x, temperature):
    """x / temperature, rounded as PyTorch does it where edits come first; None = 1."""
    return x if temperature is None else tl.div_rn(x, temperature)


@triton.jit
def _load(line, j, vocab, temperature):
    """Logits of one tile in fp32, at their temperature; -inf past the vocabulary."""
    x = tl.load(line + j, mask=j < vocab, other=float("-inf")).to(tl.float32)
    return _at_temperature(x, temperature)


@triton.jit
def _above(line, threshold, vocab, temperature, top, BLOCK: tl.constexpr):
    """Mass (relative to the maximum's) and number of the tokens above the threshold."""
    mass = tl.zeros((), tl.float64)
    count = tl.zeros((), tl.int32)
    for start in range(0, vocab, BLOCK):
        j = start + tl.arange(0, BLOCK)
        x = _load(line, j, vocab, temperature)
        above = (_ordered(x) > threshold) & (j < vocab)
        mass += tl.sum(tl.where(above, tl.exp(x - top), 0.0), 0).to(tl.float64)
        count += tl.sum(above.to(tl.int32), 0)
    return mass, count


@triton.jit
def _threshold(line, vocab, temperature, top, total, top_p, top_k, BLOCK: tl.constexpr):
    """(threshold, cutoff): kept is what lies above the threshold, and what equals it up to index ``cutoff``."""
    # Off means more than there is.
    mass_limit = tl.where(top_p >= 1.0, 2.0 * total.to(tl.float64), top_p.to(tl.float64) * total)
    count_limit = tl.where(top_k > 0, top_k, vocab + 1)
    low = _ordered(tl.full((), float("-inf"), tl.float32)).to(tl.int64)
    high = _ordered(top).to(tl.int64)
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
        equal = (_ordered(_load(line, j, vocab, temperature)) == threshold) & (j < vocab)
        rank = seen + tl.cumsum(equal.to(tl.int32), 0)
        cutoff = tl.maximum(cutoff, tl.max(tl.where(equal & (rank <= allowed), j, -1), 0))
        seen += tl.sum(equal.to(tl.int32), 0)
    return threshold, cutoff


@kernel("logits stride vocab")
def _stats_kernel(
    token_out,  # [m] int64
    confidence_out,  # [m] float32
    margin_out,
    entropy_out,
    logits,  # [m, vocab]
    temperature_in,  # [m] float32
    top_p_in,  # [m] float32
    top_k_in,  # [m] int64
    draw_in,  # [m] float64
    stride,
    vocab,
    mask_token,
    SAMPLES: tl.constexpr,
    SCALED: tl.constexpr,  # the temperature has been applied
    FILTERS: tl.constexpr,
    MARGIN: tl.constexpr,
    ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    line = logits + row * stride
    lane = tl.arange(0, BLOCK)
    sampled = False
    temperature = None
    if SAMPLES:
        given = tl.load(temperature_in + row)
        sampled = given > 0
        if not SCALED:
            temperature = tl.where(sampled, given, 1.0)

    # Each lane keeps its own maximum, sum and best token; they meet once at the end.
    lane_top = tl.full([BLOCK], _LOWEST, tl.float32)
    lane_sum = tl.zeros([BLOCK], tl.float32)
    first = tl.full([BLOCK], float("-inf"), tl.float32)
    second = tl.full([BLOCK], float("-inf"), tl.float32)
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    best_at = lane
    for start in range(0, vocab, BLOCK):
        j = start + lane
        x = _load(line, j, vocab, temperature)
        new_top = tl.maximum(lane_top, x)
        lane_sum = lane_sum * tl.exp(lane_top - new_top) + tl.exp(x - new_top)
        lane_top = new_top
        if MARGIN:
            second = tl.maximum(second, tl.minimum(first, x))
            first = tl.maximum(first, x)
        better = (x > best) & (j != mask_token)
        best = tl.where(better, x, best)
        best_at = tl.where(better, j, best_at)
    top = tl.max(lane_top, 0)
    # In fp64, as which lanes add up first goes by the width of the logits' type, which mates decide.
    total = tl.sum((lane_sum * tl.exp(lane_top - top)).to(tl.float64), 0).to(tl.float32)
    best_value = tl.max(best, 0)
    token = tl.min(tl.where(best == best_value, best_at, _NONE), 0)

    threshold = tl.full((), -0x7FFFFFFF, tl.int32)
    cutoff = tl.full((), -1, tl.int32)
    spared = tl.full((), -1, tl.int32)  # a token that is kept whatever the filter says
    kept_count = tl.full((), 2, tl.int32)
    if FILTERS:
        top_p = tl.load(top_p_in + row)
        top_k = tl.load(top_k_in + row).to(tl.int32)
        if (top_p < 1.0) | (top_k > 0):
            threshold, cutoff = _threshold(line, vocab, temperature, top, total, top_p, top_k, BLOCK)
            of_mask = _at_temperature(tl.load(line + mask_token).to(tl.float32), temperature)
            mask_leads = (of_mask > best_value) | ((of_mask == best_value) & (mask_token < token))
            spared = tl.where(mask_leads, token, -1)
            total = tl.zeros((), tl.float32)
            kept_count = tl.zeros((), tl.int32)
            for start in range(0, vocab, BLOCK):
                j = start + lane
                x = _load(line, j, vocab, temperature)
                key = _ordered(x)
                kept = (key > threshold) | ((key == threshold) & (j <= cutoff)) | (j == spared)
                total += tl.sum(tl.where(kept, tl.exp(x - top), 0.0), 0)
                kept_count += tl.sum((kept & (j < vocab)).to(tl.int32), 0)

    if MARGIN:
        top_1 = tl.max(first, 0)
        its_lane = tl.min(tl.where(first == top_1, lane, BLOCK), 0)
        top_2 = tl.max(tl.where(lane == its_lane, second, first), 0)
        runner_up = tl.where(kept_count > 1, tl.exp(top_2 - top), 0.0)
        tl.store(margin_out + row, (tl.exp(top_1 - top) - runner_up) / total)
    if ENTROPY:
        lane_entropy = tl.zeros([BLOCK], tl.float32)
        for start in range(0, vocab, BLOCK):
            j = start + lane
            x = _load(line, j, vocab, temperature)
            key = _ordered(x)
            kept = (key > threshold) | ((key == threshold) & (j <= cutoff)) | (j == spared)
            p = tl.where(kept & (j < vocab), tl.exp(x - top) / total, 0.0)
            lane_entropy -= p * tl.log(p + 1e-10)
        tl.store(entropy_out + row, tl.sum(lane_entropy.to(tl.float64), 0).to(tl.float32))
    if SAMPLES:  # noqa: SIM102  (one is known when the kernel is compiled, the other on the device)
        if sampled:
            token = _sample(
                line,
                vocab,
                temperature,
                top,
                threshold,
                cutoff,
                spared,
                mask_token,
                tl.load(draw_in + row),
                token,
                BLOCK,
            )
    confidence = tl.exp(_at_temperature(tl.load(line + token).to(tl.float32), temperature) - top) / total
    tl.store(token_out + row, token.to(tl.int64))
    tl.store(confidence_out + row, confidence)


@triton.jit
def _weights(line, j, vocab, temperature, top, threshold, cutoff, spared, mask_token):
    """fp64 weights of the tokens that may be drawn, 0 for the others."""
    x = _load(line, j, vocab, temperature)
    key = _ordered(x)
    kept = (key > threshold) | ((key == threshold) & (j <= cutoff)) | (j == spared)
    return tl.where(kept & (j < vocab) & (j != mask_token), tl.exp(x - top), 0.0).to(tl.float64)


@triton.jit
def _sample(line, vocab, temperature, top, threshold, cutoff, spared, mask_token, draw, greedy, BLOCK: tl.constexpr):
    """The first token whose running weight exceeds ``draw`` of all; ``greedy`` where no token has any weight."""
    lane = tl.arange(0, BLOCK)
    total = tl.zeros((), tl.float64)
    last = greedy  # stands in where rounding keeps the running sum below the target
    for start in range(0, vocab, BLOCK):
        w = _weights(line, start + lane, vocab, temperature, top, threshold, cutoff, spared, mask_token)
        last = tl.where(tl.max(w, 0) > 0, tl.max(tl.where(w > 0, start + lane, 0), 0), last)
        total += tl.sum(w, 0)
    target = draw * total
    drawn = tl.full((), _NONE, tl.int32)
    running = tl.zeros((), tl.float64)
    for start in range(0, vocab, BLOCK):
        w = _weights(line, start + lane, vocab, temperature, top, threshold, cutoff, spared, mask_token)
        hit = (w > 0) & (running + tl.cumsum(w, 0) > target)
        drawn = tl.minimum(drawn, tl.min(tl.where(hit, start + lane, _NONE), 0))
        running += tl.sum(w, 0)
    return tl.where(drawn < _NONE, drawn, last)


def tile_stats(
    logits: torch.Tensor,
    params: RowParams,
    mask_token_id: int,
    want_margin: bool,
    want_entropy: bool,
    scaled: bool = False,
) -> RowStats:
    """See ops.row_stats; ``logits`` stay as they are, in whatever float type."""
    rows, vocab = logits.shape
    token = torch.empty(rows, dtype=torch.int64, device=logits.device)
    confidence = torch.empty(rows, device=logits.device)
    margin = torch.empty(rows, device=logits.device) if want_margin else None
    entropy = torch.empty(rows, device=logits.device) if want_entropy else None
    if rows:
        assert logits.stride(1) == 1
        _stats_kernel[(rows,)](
            token,
            confidence,
            confidence if margin is None else margin,
            confidence if entropy is None else entropy,
            logits,
            params.temperature.contiguous(),
            params.top_p.contiguous(),
            params.top_k.contiguous(),
            (params.temperature if params.draw is None else params.draw).contiguous(),  # not read where no row samples
            logits.stride(0),
            vocab,
            mask_token_id,
            SAMPLES=params.samples,
            SCALED=scaled,
            FILTERS=params.filters and not scaled,
            MARGIN=want_margin,
            ENTROPY=want_entropy,
            BLOCK=min(BLOCK, triton.next_power_of_2(vocab)),
            num_warps=8,
        )
    return RowStats(token, confidence, margin, entropy)
