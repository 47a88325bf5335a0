"""Certainty density: a program for each request and stretch of its canvas, looping as far as its own kernel reaches.

The PyTorch twin must know on the host how far the widest row reaches; this does not wait for the device.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_d2cache.ops.density import REACH_IN_SIGMAS
from vllm_d2cache.ops.triton.common import kernel

_BLOCK = 64


@kernel()
def _density_kernel(
    out,  # [R, width] float32
    known,  # [R, width] uint8
    canvas_len,  # [R] int64
    sigma,  # [R] float32
    stride_known,
    width,
    MASKS: tl.constexpr,  # known says which are not
    REACH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    r = tl.program_id(0).to(tl.int64)
    length = tl.load(canvas_len + r)
    raw = tl.load(sigma + r).to(tl.float64)
    width_in_slots = tl.maximum(raw, 1e-6)
    reach = REACH * width_in_slots
    # Beyond twice the canvas nothing is known; the normaliser sums over three times the canvas.
    near = tl.floor(tl.minimum(reach, 2.0 * length)).to(tl.int32)
    far = tl.floor(tl.minimum(reach, 3.0 * length)).to(tl.int32)
    norm = tl.zeros((), tl.float64)
    for start in range(-far, far + 1, BLOCK):
        d = start + tl.arange(0, BLOCK)
        x = d.to(tl.float64) / width_in_slots
        norm += tl.sum(tl.where((d <= far) & (d < 3 * length), tl.exp(-0.5 * x * x), 0.0), 0)

    line = known + r * stride_known
    last = (tl.load(line + length - 1) > 0) != MASKS
    slot = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros([BLOCK], tl.float64)
    for d in range(-near, near + 1):
        at = slot + d
        inside = (at >= 0) & (at < length)
        here = (tl.load(line + at, mask=inside, other=0) > 0) != MASKS
        here = here & inside
        # Known text on the left, as long as the canvas; copies of the last slot on the right.
        left = (at < 0) & (at >= -length)
        right = (at >= length) & (at < 2 * length) & last
        x = d / width_in_slots
        acc += tl.where(here | left | right, tl.exp(-0.5 * x * x), 0.0)
    density = tl.where(raw > 0, (acc / tl.maximum(norm, 1e-8)).to(tl.float32), 1.0)
    tl.store(out + r * width + slot, tl.where(slot < length, density, 0.0), mask=slot < width)


def certainty_density(
    known: torch.Tensor, canvas_len: torch.Tensor, sigma: torch.Tensor, masks: bool = False
) -> torch.Tensor:
    """See ops.density."""
    rows, width = known.shape
    out = torch.empty(rows, width, device=known.device)
    if rows:
        assert known.stride(1) == 1
        grid = (rows, triton.cdiv(width, _BLOCK))
        flags = known.view(torch.uint8)
        _density_kernel[grid](
            out,
            flags,
            canvas_len.contiguous(),
            sigma.contiguous(),  # a column of the options
            flags.stride(0),
            width,
            MASKS=masks,
            REACH=REACH_IN_SIGMAS,
            BLOCK=_BLOCK,
        )
    return out
