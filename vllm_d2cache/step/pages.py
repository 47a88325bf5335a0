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
        slots.append(pages.slots(rows.request, rows.text_positions, rows.live, rows.exact))
    if fills is not None:
        owner = fills.request + len(counts)
        counts, lengths = counts + fills.counts, lengths + fills.lengths
        where.append(fills.positions)
        slots.append(pages.slots(owner, fills.positions, torch.ones_like(owner, dtype=torch.bool), True))
    limits = spans(where[0] if len(where) == 1 else torch.cat(where), block_length)
    to = slots[0] if len(slots) == 1 else torch.cat(slots)
    exact = rows is None or rows.exact
    return PagedLayout(counts, lengths, pages.table, pages.first_blocks(lengths), to, limits=limits, exact=exact)


@dataclass(frozen=True)
class Pages:
    """The block tables of a step."""

    table: torch.Tensor  # [R, blocks] int, KV block ids; those behind a request's own say nothing
    block_size: int

    def slots(
        self, request: torch.Tensor, positions: torch.Tensor, live: torch.Tensor, exact: bool = False
    ) -> torch.Tensor:
        """[N] int64: flat KV slot of each row; -1 for padding: not ``live`` [N] bool. ``exact``: there is none."""
        return page_slots(self.table, request, positions, live, self.block_size, exact)

    def first_blocks(self, lengths: list[int]) -> list[int]:
        """Of each request of ``lengths`` positions, its first block where its blocks are consecutive, else -1.

        Looked up in every step, as blocks may be appended. Kernels do not ask. Where PyTorch attends on a CPU, text in
        consecutive blocks is read in place, and nothing has to be waited for.
        """
        device = self.table.device
        if device.type != "cpu" or chosen(device) != "torch":
            return [-1] * len(lengths)
        table = self.table.numpy()[: len(lengths), : -(-max(lengths, default=0) // self.block_size)]
        return _first_blocks(table.tobytes(), table.dtype.str, tuple(lengths), self.block_size)


@lru_cache(maxsize=8)
def _first_blocks(table: bytes, dtype: str, lengths: tuple[int, ...], block_size: int) -> list[int]:
    """Of texts whose blocks are the lines of ``table``: most steps find them as the last one has left them.

    Never written.
    """
    used = -(-np.array(lengths, dtype=np.int64) // block_size)
    blocks = np.frombuffer(table, dtype=dtype).reshape(len(lengths), -1)
    first, block = blocks[:, :1], np.arange(blocks.shape[1])
    consecutive = (blocks == first + block) | (block >= used[:, None])
    return np.where(consecutive.all(1), first[:, 0], -1).tolist()
