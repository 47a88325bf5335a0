"""Where the texts of a step's requests lie in the KV cache."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vllm_d2cache.canvas.rows import StepRows
from vllm_d2cache.ops.dispatch import chosen
from vllm_d2cache.ops.step_rows import page_slots


@dataclass(frozen=True)
class Pages:
    """The block tables of a step."""

    table: torch.Tensor  # [R, blocks] int, KV block ids; those behind a request's own say nothing
    block_size: int

    def slots(self, rows: StepRows) -> torch.Tensor:
        """[N - S] int64: flat KV slot of each row of the text, -1 for padding."""
        return page_slots(self.table, rows.request, rows.text_positions, rows.live, self.block_size)

    def first_blocks(self, lengths: list[int]) -> list[int]:
        """Of each request of ``lengths`` positions, its first block where its blocks are consecutive, else -1.

        Looked up in every step, as blocks may be appended. Kernels do not ask. Where PyTorch attends on a CPU, text in
        consecutive blocks is read in place, and nothing has to be waited for.
        """
        device = self.table.device
        if device.type != "cpu" or chosen(device) != "torch":
            return [-1] * len(lengths)
        used = [-(-length // self.block_size) for length in lengths]
        block = torch.arange(max(used)).unsqueeze(0)
        first = self.table[: len(lengths), :1].long()
        behind = block >= torch.tensor(used).unsqueeze(1)
        consecutive = (self.table[: len(lengths), : max(used)] == first + block) | behind
        return torch.where(consecutive.all(1), first.squeeze(1), -1).tolist()
