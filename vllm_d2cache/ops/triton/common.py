"""What several kernels share."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl

from vllm_d2cache.ops.split import TILE

# Triton's interpreter runs kernels on CPU tensors with NumPy (TRITON_INTERPRET=1 before Triton is imported).
INTERPRETED: bool = triton.knobs.runtime.interpret

# Columns of a line that a program looks at at a time, where it walks along the line.
STRETCH = 1024

_TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


ALL_REGISTERS = {"maxnreg": 255}
"""Launch option of kernels that have a block a request, or of others of which no third one is to share a processor.

Left alone, the compiler would rather keep a few bytes in memory than let fewer blocks share a multiprocessor.
"""


def architecture() -> int:
    """Of the card that kernels are compiled for, 90 for an H100; 0 in the interpreter."""
    return 0 if INTERPRETED else int(triton.runtime.driver.active.get_current_target().arch)


def dot_type(dtype: torch.dtype) -> tl.dtype:
    """The type in which operands of ``dtype`` enter a matrix product; sums are fp32 always.

    The interpreter holds bfloat16 as bit patterns and multiplies those: it gets the same values in fp32.
    """
    return tl.float32 if INTERPRETED else _TYPES[dtype]


def tile_shape(dtype: torch.dtype) -> tuple[int, int]:
    """Rows and keys of a tile of attention; they go by the type alone, never by the batch.

    Exact fp32 products do not run on tensor cores, and a larger tile needs more registers than a thread has
    (tests/triton/test_compiles_for_hopper.py). Not measured on a GPU yet; benchmarks/gpu times other sizes.
    """
    return (16, 16) if dtype == torch.float32 else TILE


def model_constants(query: torch.Tensor, kv_cache: torch.Tensor) -> dict[str, Any]:
    """What the model's shape says to kernels that attend.

    Args:
        query: [N, heads, head size].
        kv_cache: [blocks, kv heads, block size, 2 * head size].
    """
    heads, head_size = query.shape[1:]
    return {
        "HEADS": heads,
        "GROUP": heads // kv_cache.shape[1],
        "HEAD": head_size,
        "BLOCK_SIZE": kv_cache.shape[2],
        "BLOCK_D": triton.next_power_of_2(head_size),
        "DOT": dot_type(query.dtype),
    }


def as_bytes(flags: torch.Tensor) -> torch.Tensor:
    """Bools as a kernel sees them, without gaps."""
    return flags.contiguous().view(torch.uint8)


def kernel(specialised: str = "") -> Callable[[Callable[..., Any]], Any]:
    """``triton.jit`` without its habit of compiling a kernel anew wherever a pointer or number is a multiple of 16.

    Batches differ in that, and requests would wait for the compiler in the middle of their work (engine/warm_up.py).

    Args:
        specialised: parameters that keep it, as wide loads depend on it: those aligned alike in all batches of a model.
    """
    told_apart = specialised.split()

    def compiled(function: Callable[..., Any]) -> Any:
        parameters = inspect.signature(function).parameters
        assert parameters.keys() >= set(told_apart)
        variables = [name for name, p in parameters.items() if "constexpr" not in str(p.annotation)]
        plain = [name for name in variables if name not in told_apart]
        return triton.jit(function, do_not_specialize=plain)

    return compiled


@triton.jit
def find_request(row_starts, tile, num_requests, ROWS: tl.constexpr):
    """(request, first row) of a tile of ROWS rows, no tile crossing into the next request.

    Request r owns the tile numbers from row_starts[r] // ROWS + r on: at least as many as it needs. The last of them
    may lie past its end; the caller checks. Binary search, so the grid needs no map from tiles to requests.
    """
    low = 0
    high = num_requests
    while low < high:
        middle = (low + high) // 2
        if tl.load(row_starts + middle) // ROWS + middle <= tile:
            low = middle + 1
        else:
            high = middle
    request = low - 1
    start = tl.load(row_starts + request)
    return request, start + (tile - (start // ROWS + request)) * ROWS


def num_tiles(num_rows: int, num_requests: int, rows: int) -> int:
    """Tile numbers that :func:`find_request` hands out."""
    return num_rows // rows + num_requests
