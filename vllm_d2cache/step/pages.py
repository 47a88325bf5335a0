"""Where the texts of a step's requests lie in the KV cache."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vllm_d2cache.canvas.rows import StepRows


@dataclass(frozen=True)
class Pages:
    """The block tables of a step."""

    table: torch.Tensor  # [R, blocks] int, KV block ids; those behind a request's own say nothing
    block_size: int

    def slots(self, rows: StepRows) -> torch.Tensor:
        """[N - S] int64: flat KV slot of each row of the text, -1 for padding."""
        block = rows.text_positions.div(self.block_size, rounding_mode="floor")
        within = rows.text_positions - block * self.block_size
        slots = self.table[rows.request, block].long() * self.block_size + within
        return torch.where(rows.live, slots, -1)

    def first_blocks(self, lengths: list[int]) -> list[int]:
        """Of each request of ``lengths`` positions, its first block where its blocks are consecutive, else -1.

        Looked up in every step, as blocks may be appended. Kernels do not ask; on a CPU, where nothing has to be waited
        for, a text in consecutive blocks is read in place.
        """
        if self.table.device.type != "cpu":
            return [-1] * len(lengths)
        used = torch.tensor([-(-length // self.block_size) for length in lengths]).unsqueeze(1)
        block = torch.arange(int(used.max())).unsqueeze(0)
        first = self.table[: len(lengths), :1].long()
        consecutive = (self.table[: len(lengths), : block.shape[1]] == first + block) | (block >= used)
        return torch.where(consecutive.all(1), first.squeeze(1), -1).tolist()
