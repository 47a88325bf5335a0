"""Row statistics in tiles of the vocabulary: a program for each row, nothing of the size of the logits but the logits.

One pass gives maximum, normaliser, best token and the two best values. What a nucleus or top-k filter keeps is found
as ops/triton/row_filter.py does it. Sampling inverts the same cumulative distribution as the twin, in the order of the
vocabulary and in fp64.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_d2cache.ops.row_stats import RowParams, RowStats
from vllm_d2cache.ops.triton.common import kernel
from vllm_d2cache.ops.triton.row_filter import (
    BLOCK,
    LOWEST,
    NONE,
    add,
    at_temperature,
    bounds,
    is_kept,
    load,
    read_row,
    total_of,
)


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

    top, total, best_value, token, first, second = read_row(line, vocab, temperature, mask_token, MARGIN, BLOCK)
    threshold = tl.full((), -0x7FFFFFFF, tl.int32)
    cutoff = tl.full((), -1, tl.int32)
    spared = tl.full((), -1, tl.int32)  # a token that is kept whatever the filter says
    num_kept = tl.full((), 2, tl.int32)
    if FILTERS:
        top_p = tl.load(top_p_in + row)
        top_k = tl.load(top_k_in + row).to(tl.int32)
        if (top_p < 1.0) | (top_k > 0):
            threshold, cutoff, spared = bounds(
                line, vocab, temperature, top, total, best_value, token, mask_token, top_p, top_k, BLOCK
            )
            lane_top = tl.full([BLOCK], LOWEST, tl.float32)
            lane_sum = tl.zeros([BLOCK], tl.float32)
            kept_count = tl.zeros([BLOCK], tl.int32)
            for start in range(0, vocab, BLOCK):
                j = start + lane
                x = load(line, j, vocab, temperature)
                kept = is_kept(x, j, threshold, cutoff, spared) & (j < vocab)
                lane_top, lane_sum = add(lane_top, lane_sum, tl.where(kept, x, LOWEST))
                kept_count += kept.to(tl.int32)
            total, num_kept = total_of(lane_top, lane_sum, top), tl.sum(kept_count, 0)

    if MARGIN:
        top_1 = tl.max(first, 0)
        its_lane = tl.min(tl.where(first == top_1, lane, BLOCK), 0)
        top_2 = tl.max(tl.where(lane == its_lane, second, first), 0)
        runner_up = tl.where(num_kept > 1, tl.exp(top_2 - top), 0.0)
        tl.store(margin_out + row, (tl.exp(top_1 - top) - runner_up) / total)
    if ENTROPY:
        lane_entropy = tl.zeros([BLOCK], tl.float32)
        for start in range(0, vocab, BLOCK):
            j = start + lane
            x = load(line, j, vocab, temperature)
            kept = is_kept(x, j, threshold, cutoff, spared)
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
    confidence = tl.exp(at_temperature(tl.load(line + token).to(tl.float32), temperature) - top) / total
    tl.store(token_out + row, token.to(tl.int64))
    tl.store(confidence_out + row, confidence)


@triton.jit
def _weights(line, j, vocab, temperature, top, threshold, cutoff, spared, mask_token):
    """fp64 weights of the tokens that may be drawn, 0 for the others."""
    x = load(line, j, vocab, temperature)
    kept = is_kept(x, j, threshold, cutoff, spared)
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
    drawn = tl.full((), NONE, tl.int32)
    running = tl.zeros((), tl.float64)
    for start in range(0, vocab, BLOCK):
        w = _weights(line, start + lane, vocab, temperature, top, threshold, cutoff, spared, mask_token)
        hit = (w > 0) & (running + tl.cumsum(w, 0) > target)
        drawn = tl.minimum(drawn, tl.min(tl.where(hit, start + lane, NONE), 0))
        running += tl.sum(w, 0)
    return tl.where(drawn < NONE, drawn, last)


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
