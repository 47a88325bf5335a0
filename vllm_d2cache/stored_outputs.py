"""Layers that take a row's stored output in place of computing it, for requests whose policy keeps layer outputs.

A layer's output of a row is what attention and MLP together add to the residual stream. The first layer computes every
row of the step; a later one the rows that are not marked, and of the marked ones those whose values changed most. All
other marked rows add what the layer has stored for them. Shadows (ops/shadow_attention.py) stand behind the rows of the
text and are always computed. No vLLM here: a layer is whatever has the interface below.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from vllm_d2cache.attention.capture import TensorParallel
from vllm_d2cache.ops.paged_attention import PagedLayout
from vllm_d2cache.ops.value_change import cosine, least_similar, similarity_parts, swap_values
from vllm_d2cache.records import StoredRows


class Layer(Protocol):
    """One transformer layer; the residual stream is ``hidden + residual``."""

    pages: torch.Tensor  # [blocks, kv heads, block size, 2 * head size], K and V

    def __call__(
        self, positions: torch.Tensor, hidden: torch.Tensor, residual: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows [n, d] before the layer -> behind it; K and V of the rows are written to the cache."""

    def values(self, hidden: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """[n, kv heads, head size] of rows [n, d] before the layer. May overwrite its arguments."""


class OutputStore:
    """What the layers have stored of the running requests: slot -> [layers - 1, rows, d]."""

    def __init__(self) -> None:
        self._outputs: dict[int, torch.Tensor] = {}

    def of(self, slot: int, layers: int, rows: int, like: torch.Tensor) -> torch.Tensor:
        """The outputs of a slot, made when its request's first step asks for them."""
        if slot not in self._outputs:
            self._outputs[slot] = like.new_zeros(layers, rows, like.shape[1])
        return self._outputs[slot]

    def drop(self, slot: int) -> None:
        """Forget a request."""
        self._outputs.pop(slot, None)


@dataclass
class PartialForward:
    """Runs the layers of one forward pass.

    Attributes:
        rows: which rows are stored, compared and kept.
        slots: of the requests.
        layout: of all rows of the step.
        use_layout: tells attention whose rows the next layer has.
        tensor_parallel: None on a single rank.
    """

    rows: StoredRows
    slots: list[int]
    layout: PagedLayout
    use_layout: Callable[[PagedLayout], None]
    store: OutputStore
    tensor_parallel: TensorParallel | None = None

    def run(self, layers: Sequence[Layer], positions: torch.Tensor, hidden: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """[N, d] embeddings -> hidden and residual [N, d] behind the last layer."""
        hidden, residual = layers[0](positions, hidden, None)
        for number, layer in enumerate(layers[1:]):
            hidden, residual = self._layer(layer, number, len(layers) - 1, positions, hidden, residual)
        self.use_layout(self.layout)
        return hidden, residual

    def _layer(
        self,
        layer: Layer,
        number: int,
        num_layers: int,
        positions: torch.Tensor,
        hidden: torch.Tensor,
        residual: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        computed = self._computed(layer, hidden, residual)
        index = computed.nonzero().flatten()
        fresh, stream = hidden[index], residual[index]
        outputs = torch.zeros_like(hidden)
        if len(index):
            before = fresh.float() + stream.float()
            in_text = index[index < self.layout.slots.shape[0]]
            self.use_layout(replace(self.layout, counts=self.rows.computed, slots=self.layout.slots[in_text]))
            fresh, stream = layer(positions[index], fresh, stream)
            outputs[index] = (fresh.float() + stream.float() - before).to(hidden.dtype)

        residual = residual + hidden
        hidden = torch.zeros_like(hidden)
        for r, (mine, place) in self.rows.kept.items():
            stored = self.store.of(self.slots[r], num_layers, self.rows.capacity[r], hidden)[number]
            stored[place] = torch.where(computed[mine].unsqueeze(1), outputs[mine], stored[place])
            hidden[mine] = stored[place]
        # Rows that were computed keep the layer's own split of the stream: other requests get what they always get.
        hidden[index], residual[index] = fresh, stream
        return hidden, residual

    def _computed(self, layer: Layer, hidden: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """[N] bool: the rows that this layer computes. Writes the values of the compared ones."""
        rows = self.rows
        computed = torch.ones(hidden.shape[0], dtype=torch.bool, device=hidden.device)
        computed[: rows.stored.shape[0]] = ~rows.stored
        if len(rows.compared):
            index = rows.compared
            value = layer.values(hidden[index], residual[index])
            parts = similarity_parts(value, swap_values(layer.pages, value, self.layout.slots[index]))
            if self.tensor_parallel is not None:
                parts = self.tensor_parallel.all_reduce(parts)
            computed[index] = least_similar(cosine(parts), rows.request[index], rows.count)
        return computed
