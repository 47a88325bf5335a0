"""Rows that leave the network behind a layer, for requests whose policy drops rows.

Behind some layers a request keeps the rows that matter: a score says which, made of what the policy knew before the
step and of how far each row's hidden state has moved since a step in which the row stayed. How many stay is known on
the host, so that all shapes are; which, on the device alone. Nothing of a row that left is computed in deeper layers,
and it has no logits: the slots that are read from it are not candidates of this step. No vLLM here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vllm_d2cache.ops.hidden_change import at_most_one, relative_change
from vllm_d2cache.ops.host import upload
from vllm_d2cache.ops.value_change import most_changed
from vllm_d2cache.records import ExitingRows
from vllm_d2cache.row_store import RowStore


@dataclass
class RowGate:
    """Which rows are still in the network, during one forward pass.

    Attributes:
        slots: of the requests.
        memory: hidden states behind the layers where rows may leave, of rows that stayed; changed.
        present: [N] bool, rows that have not left.
    """

    rows: ExitingRows
    slots: list[int]
    memory: RowStore
    present: torch.Tensor

    @classmethod
    def open(cls, rows: ExitingRows, slots: list[int], memory: RowStore) -> RowGate:
        """Before the first layer: all rows are there."""
        return cls(rows, slots, memory, torch.ones_like(rows.request, dtype=torch.bool))

    def pass_layer(self, layer: int, hidden: torch.Tensor, residual: torch.Tensor) -> None:
        """Let rows leave behind a layer.

        Args:
            hidden, residual: [N, d] behind the layer; their sum is the hidden state. Rows that left are not read.
        """
        exits = self.rows.exits[layer]
        if not exits:
            return
        mine = [self.rows.remembered[r] for r in exits]
        index = torch.cat([rows for rows, _ in mine])
        state = hidden[index] + residual[index]
        stores = [self._store(r, layer, state) for r in exits]
        old = torch.cat([store[place] for store, (_, place) in zip(stores, mine, strict=True)])

        present, request = self.present[index], self.rows.request[index]
        # A request's largest change is that of the rows that are still there.
        change = relative_change(state, old).masked_fill(~present, 0)
        change = at_most_one(change, request, len(self.slots))
        score = (self.rows.bias[index] + self.rows.weight[index] * change).masked_fill(~present, -torch.inf)
        count = [exits.get(r, 0) for r in range(len(self.slots))]
        stays = most_changed(score, request, upload(count, torch.int64, index.device))
        self.present[index] = stays

        sizes = [len(place) for _, place in mine]
        parts = zip(stores, mine, state.split(sizes), stays.split(sizes), strict=True)
        for store, (_, place), now, stay in parts:
            store[place] = torch.where(stay.unsqueeze(1), now, store[place])

    def _store(self, r: int, layer: int, like: torch.Tensor) -> torch.Tensor:
        """[places, d] of a request behind this layer."""
        layers = [number for number, exits in enumerate(self.rows.exits) if r in exits]
        store = self.memory.of(self.slots[r], len(layers), self.rows.capacity[r], like)
        return store[layers.index(layer)]
