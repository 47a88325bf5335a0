"""Requests in paged memory for the kernels' tests: whatever no kernel may read is NaN."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vllm_d2cache.ops.paged_attention import AttentionMaps, MapPlan, PagedLayout, write_kv


@dataclass(frozen=True)
class Shape:
    """Of one model's attention."""

    heads: int
    kv_heads: int
    head_size: int
    block_size: int = 16
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        kind = str(self.dtype).removeprefix("torch.")
        return f"{self.heads}-{self.kv_heads}x{self.head_size}-page{self.block_size}-{kind}"


@dataclass
class Batch:
    """A step's rows, beside their pages. ``dense`` is the same without padding rows, which the twins never meet."""

    query: torch.Tensor
    cache: torch.Tensor
    layout: PagedLayout
    dense: PagedLayout
    positions: torch.Tensor  # [N]
    live: torch.Tensor  # [N] bool, not a padding row

    def maps(self, kept: list[bool], layout: PagedLayout | None = None, keep_lse: bool = False) -> AttentionMaps:
        """Maps of the requests that keep one, full of NaN."""
        layout = layout or self.layout
        sizes = zip(layout.counts, layout.lengths, kept, strict=True)
        plan = MapPlan.pack([(n, t) if keep else None for n, t, keep in sizes])
        memory = torch.full((plan.elements,), torch.nan, device=self.query.device)
        lse = torch.full(self.query.shape[:2], torch.nan, device=self.query.device) if keep_lse else None
        return AttentionMaps(plan, memory, lse)


def make_batch(
    counts: list[int],
    lengths: list[int],
    shape: Shape,
    device: torch.device,
    padding: list[int] | None = None,
    heads_first: bool = True,
) -> Batch:
    """Rows at random positions of requests in shuffled blocks.

    Args:
        padding: rows of each request, its last ones, that are padding (there may be more rows than positions only if
            the rest are); their queries and positions are poison.
        heads_first: memory order [kv heads, blocks, ...] of the cache, else [blocks, kv heads, ...].
    """
    size, head = shape.block_size, shape.head_size
    padding = padding or [0] * len(counts)
    need = [-(-t // size) for t in lengths]
    ids = torch.randperm(sum(need)) + 1  # block 0 is nobody's
    table = torch.full((len(lengths), max(need) + 1), 1 << 30, dtype=torch.int32)
    for row, blocks in zip(table, ids.split(need), strict=True):
        row[: len(blocks)] = blocks
    table = table.to(device)
    cache = torch.full((shape.kv_heads, 1 + sum(need), size, 2 * head), torch.nan, dtype=shape.dtype, device=device)
    cache = cache.transpose(0, 1) if heads_first else cache.transpose(0, 1).contiguous()
    slots, positions, live = [], [], []
    for r, (count, length, pad) in enumerate(zip(counts, lengths, padding, strict=True)):
        everywhere = torch.arange(length, device=device)
        page = table[r, everywhere // size].long()
        content = torch.randn(2, length, shape.kv_heads, head, device=device).to(shape.dtype)
        write_kv(cache, content[0], content[1], page * size + everywhere % size)
        rows = torch.zeros(count, dtype=torch.int64)
        rows[: min(count, length)] = torch.randperm(length)[:count].sort().values
        rows = rows.to(device)
        slot = table[r, rows // size].long() * size + rows % size
        is_live = torch.arange(count, device=device) < count - pad
        slots.append(torch.where(is_live, slot, -1))
        positions.append(torch.where(is_live, rows, 1 << 40))
        live.append(is_live)
    keep = torch.cat(live)
    query = torch.randn(sum(counts), shape.heads, head, device=device).to(shape.dtype)
    query[~keep] = torch.nan
    slot_of_row = torch.cat(slots)
    real = [n - p for n, p in zip(counts, padding, strict=True)]
    layout = PagedLayout(counts, lengths, table, [-1] * len(counts), slot_of_row)
    dense = PagedLayout(real, lengths, table, [-1] * len(counts), slot_of_row[keep])
    return Batch(query, cache, layout, dense, torch.cat(positions), keep)


def tolerance(dtype: torch.dtype) -> dict[str, float]:
    """fp32: the order of sums. 16 bits: probabilities are rounded to 8 or 11 bits before they meet the values."""
    if dtype == torch.float32:
        return {"rtol": 1e-4, "atol": 1e-5}
    return {"rtol": 2e-2, "atol": 2e-2}
