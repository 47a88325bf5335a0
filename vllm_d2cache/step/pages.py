"""Where the texts of a step's requests lie in the KV cache."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from vllm_d2cache.canvas.rows import StepRows
from vllm_d2cache.ops.dispatch import chosen
from vllm_d2cache.ops.paged_attention import PagedLayout, spans
from vllm_d2cache.ops.step_rows import page_slots
from vllm_d2cache.step.fills import Fills


def place_rows(rows: StepRows | None, fills: Fills | None, pages: Pages, block_length: int | None) -> PagedLayout:
    """Where the keys of a step's requests lie, and where those of its rows go.

    Args:
        pages: of all requests of the batch.
    """
    counts, lengths, where, slots = [], [], [], []
    if fills is not None:  # a line for each that decides, then for each that is filled
        pages = Pages(pages.table[fills.order], pages.block_size)
    if rows is not None:
        counts, lengths = list(rows.counts), list(rows.visible)
        where.append(rows.text_positions)
        slots.append(pages.slots(rows.request, rows.text_positions, rows.live))
    if fills is not None:
        owner = fills.request + len(counts)
        counts, lengths = counts + fills.counts, lengths + fills.lengths
        where.append(fills.positions)
        slots.append(pages.slots(owner, fills.positions, torch.ones_like(owner, dtype=torch.bool)))
    limits = spans(where[0] if len(where) == 1 else torch.cat(where), block_length)
    to = slots[0] if len(slots) == 1 else torch.cat(slots)
    return PagedLayout(counts, lengths, pages.table, pages.first_blocks(lengths), to, limits=limits)


@dataclass(frozen=True)
class Pages:
    """The block tables of a step."""

    table: torch.Tensor  # [R, blocks] int, KV block ids; those behind a request's own say nothing
    block_size: int

    def slots(self, request: torch.Tensor, positions: torch.Tensor, live: torch.Tensor) -> torch.Tensor:
        """[N] int64: flat KV slot of each row; -1 for padding, which is not ``live`` [N] bool."""
        return page_slots(self.table, request, positions, live, self.block_size)

    def first_blocks(self, lengths: list[int]) -> list[int]:
        """Of each request of ``lengths`` positions, its first block where its blocks are consecutive, else -1.

        Looked up in every step, as blocks may be appended. Kernels do not ask. Where PyTorch attends on a CPU, text in
        consecutive blocks is read in place, and nothing has to be waited for.
        """
        device = self.table.device
        if device.type != "cpu" or chosen(device) != "torch":
            return [-1] * len(lengths)
        block, unused = _blocks(tuple(lengths), self.block_size)
        table = self.table.numpy()[: len(lengths)]
        first = table[:, :1]
        consecutive = (table[:, : len(block)] == first + block) | unused
        return np.where(consecutive.all(1), first[:, 0], -1).tolist()


@lru_cache(maxsize=8)
def _blocks(lengths: tuple[int, ...], block_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the blocks that the longest text has [b], and which of them each has not [R, b]. Never written."""
    used = -(-np.array(lengths) // block_size)
    block = np.arange(used.max())
    return block, block >= used[:, None]
