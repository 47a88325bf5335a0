"""Rotary position embedding of queries and keys, and where the rotated keys go: in PyTorch, the specification."""

from __future__ import annotations

import torch

from vllm_d2cache.ops.dispatch import dispatched
from vllm_d2cache.ops.paged_attention import write_kv


@dispatched("vllm_d2cache.ops.triton.rotary")
def rotate_and_write(
    kv_cache: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    positions: torch.Tensor,
    cos_sin: torch.Tensor,
    slots: torch.Tensor,
    query_out: torch.Tensor,
    key_out: torch.Tensor | None = None,
) -> None:
    """Rotate queries and keys by their positions, and put keys and values into their pages.

    The rotation is computed in fp32 and rounded once, to the type of what is rotated. The first half of the rotated
    numbers of a head turns with the second half; numbers behind them pass. (Without
    kernels, models/common.py has vLLM's own rotation do it, which rounds alike, and attention write the pages.)

    Args:
        kv_cache: [blocks, kv heads, block size, 2 * head size], keys first; written.
        query: [N, heads, head size].
        key, value: [N, kv heads, head size].
        positions: [N] int64 below the length of ``cos_sin``, but for padding rows.
        cos_sin: [positions, rotary dim] float32, or the model's type; cosines, then sines, of half of the dim each.
        slots: [n] int64, flat KV slot of each of the first n <= N rows; -1 = a padding row, which is written nowhere,
            and whose query comes out as zeros. Rows behind them are in no page.
        query_out: [N, heads, head size], written; may be ``query``.
        key_out: [N, kv heads, head size], the rotated keys of all rows but padding, for who needs them beside the
            pages; may be ``key``. None = not wanted.
    """
    in_pages = slots.shape[0]
    padding = torch.zeros(len(positions), 1, 1, dtype=torch.bool, device=slots.device)
    padding[:in_pages, 0, 0] = slots < 0
    cos, sin = cos_sin[torch.where(padding[:, 0, 0], 0, positions)].float().unsqueeze(1).chunk(2, dim=-1)
    rotated = _rotate(key, cos, sin)
    query_out.copy_(_rotate(query, cos, sin).masked_fill(padding, 0.0))
    if key_out is not None:
        key_out.copy_(torch.where(padding, key_out, rotated))
    write_kv(kv_cache, rotated[:in_pages], value[:in_pages], slots)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """[N, heads, head size] by [N, 1, rotary dim / 2] each."""
    half = cos.shape[-1]
    first, second, rest = x[..., :half].float(), x[..., half : 2 * half].float(), x[..., 2 * half :]
    turned = (first * cos - second * sin).to(x.dtype), (second * cos + first * sin).to(x.dtype)
    return torch.cat([*turned, rest], dim=-1)
