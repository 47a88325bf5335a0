"""Canvas slots to positions and back: a program a line and stretch of columns."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_d2cache.ops.triton.common import kernel

_BLOCK = 512


@kernel()
def _shift_kernel(
    out,  # [R, width]
    values,  # [R, columns]
    first,  # [R] int64, position of slot 0
    length,  # [R] int64, slots
    columns,
    stride,
    width,
    TO_SLOTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    start, slots = tl.load(first + row), tl.load(length + row)
    if TO_SLOTS:
        source, inside = start + column, column < slots
    else:
        source = column - start
        inside = (source >= 0) & (source < slots)
    inside = inside & (source < columns) & (column < width)
    found = tl.load(values + row * stride + source, mask=inside, other=0)
    tl.store(out + row * width + column, found, mask=column < width)


def to_positions(values: torch.Tensor, first: torch.Tensor, length: torch.Tensor, width: int) -> torch.Tensor:
    """See ops.canvas_columns."""
    return _shifted(values, first, length, width, to_slots=False)


def to_slots(values: torch.Tensor, first: torch.Tensor, length: torch.Tensor, width: int) -> torch.Tensor:
    """See ops.canvas_columns."""
    return _shifted(values, first, length, width, to_slots=True)


def _shifted(
    values: torch.Tensor, first: torch.Tensor, length: torch.Tensor, width: int, to_slots: bool
) -> torch.Tensor:
    out = torch.empty(values.shape[0], width, dtype=values.dtype, device=values.device)
    if values.stride(1) != 1:
        values = values.contiguous()
    # A bool is a byte to the kernel.
    bytes_ = (out.view(torch.uint8), values.view(torch.uint8)) if values.dtype == torch.bool else (out, values)
    _shift_kernel[(values.shape[0], triton.cdiv(width, _BLOCK))](
        *bytes_,
        first.contiguous(),
        length.contiguous(),
        values.shape[1],
        values.stride(0),
        width,
        TO_SLOTS=to_slots,
        BLOCK=_BLOCK,
    )
    return out
