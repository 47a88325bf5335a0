"""Sampling parameters and random numbers of rows: a kernel for what are forty operators."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_d2cache.ops import random
from vllm_d2cache.ops.row_sampling import RowSampling
from vllm_d2cache.ops.triton.common import kernel

_ROWS = 256
_GOLDEN, _MIX_1, _MIX_2 = (tl.constexpr(x) for x in (random._GOLDEN, random._MIX_1, random._MIX_2))


@triton.jit
def _shift_right(x, bits: tl.constexpr):
    """Logical (zero-filling) right shift of int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


@triton.jit
def _mix(x):
    """See ops.random."""
    x = (x ^ _shift_right(x, 30)) * _MIX_1
    x = (x ^ _shift_right(x, 27)) * _MIX_2
    return x ^ _shift_right(x, 31)


@kernel()
def _sampling_kernel(
    temperature,  # [n] float32, written
    top_p,  # [n] float32, written
    top_k,  # [n] int64, written
    draw,  # [n] float64, written
    who,  # [n] int64
    slot,  # [n] int64
    slots,  # [R] int64
    prompt_len,  # [R] int64
    sampling,  # [S, 3] float32
    seed,  # [S] int64
    step,  # [S] int64
    count,
    DRAWS: tl.constexpr,
    ROWS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < count
    request = tl.load(who + row, mask=inside, other=0)
    owner = tl.load(slots + request, mask=inside, other=0)
    tl.store(temperature + row, tl.load(sampling + owner * 3, mask=inside), mask=inside)
    tl.store(top_p + row, tl.load(sampling + owner * 3 + 1, mask=inside), mask=inside)
    tl.store(top_k + row, tl.load(sampling + owner * 3 + 2, mask=inside).to(tl.int64), mask=inside)
    if DRAWS:
        position = tl.load(prompt_len + request, mask=inside, other=0) + tl.load(slot + row, mask=inside, other=0)
        state = _mix(tl.load(seed + owner, mask=inside, other=0) + _GOLDEN)
        state = _mix(state + tl.load(step + owner, mask=inside, other=0) * _GOLDEN)
        state = _mix(state + position * _GOLDEN)
        tl.store(draw + row, _shift_right(state, 11).to(tl.float64) * (1.0 / (1 << 53)), mask=inside)


def sampling_of_rows(
    who: torch.Tensor,
    slot: torch.Tensor,
    slots: torch.Tensor,
    prompt_len: torch.Tensor,
    sampling: torch.Tensor,
    seeds: tuple[torch.Tensor, torch.Tensor] | None,
) -> RowSampling:
    """See ops.row_sampling."""
    n, device = who.shape[0], who.device
    temperature, top_p = (torch.empty(n, device=device) for _ in range(2))
    top_k = torch.empty(n, dtype=torch.int64, device=device)
    draw = None if seeds is None else torch.empty(n, dtype=torch.float64, device=device)
    if n:
        _sampling_kernel[(triton.cdiv(n, _ROWS),)](
            temperature,
            top_p,
            top_k,
            temperature if draw is None else draw,
            who.contiguous(),
            slot.contiguous(),
            slots,
            prompt_len,
            sampling,
            *((slots, slots) if seeds is None else seeds),
            n,
            DRAWS=draw is not None,
            ROWS=_ROWS,
        )
    return RowSampling(temperature, top_p, top_k, draw)
