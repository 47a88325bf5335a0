"""A forward pass whose layers compute a part of its rows, for requests whose policy keeps layer outputs or drops rows.

A layer's output of a row is what attention and MLP together add to the residual stream. The first layer computes every
row of the step; a later one the rows that are not marked, and of the marked ones those whose values changed most. All
other marked rows add what the layer has stored for them. Rows that have left (row_exits.py) are in no layer. Shadows
(ops/shadow_attention.py) stand behind the rows of the text and are always computed. No vLLM here: a layer is whatever
has the interface below.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from vllm_d2cache.attention.capture import TensorParallel
from vllm_d2cache.ops.paged_attention import PagedLayout
from vllm_d2cache.ops.value_change import change_parts, cosine_distance, most_changed, swap_values, write_keys
from vllm_d2cache.records import StoredRows
from vllm_d2cache.row_exits import RowGate
from vllm_d2cache.row_store import RowStore
from vllm_d2cache.value_directions import ValueDirections, leading


class Layer(Protocol):
    """One transformer layer; the residual stream is ``hidden + residual``."""

    pages: torch.Tensor  # [blocks, kv heads, block size, 2 * head size], K and V

    def __call__(
        self, positions: torch.Tensor, hidden: torch.Tensor, residual: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows [n, d] before the layer -> behind it; K and V of the rows are written to the cache."""

    def values(self, hidden: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """[n, kv heads, head size] of rows [n, d] before the layer. May overwrite its arguments."""

    def keys_and_values(
        self, positions: torch.Tensor, hidden: torch.Tensor, residual: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Two of [n, kv heads, head size], the keys as the cache has them. May overwrite its arguments."""

    def value_projection(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """See value_directions.Projects."""


@dataclass
class PartialForward:
    """Runs the layers of one forward pass.

    Attributes:
        rows: which rows are stored, compared and kept; None where no policy stores outputs.
        gate: lets rows leave; None where no policy drops rows.
        slots: of the requests.
        layout: of all rows of the step.
        use_layout: tells attention whose rows the next layer has.
        directions: of the layers' values, for rows that are compared by proxies.
        tensor_parallel: None on a single rank.
    """

    rows: StoredRows | None
    gate: RowGate | None
    slots: list[int]
    layout: PagedLayout
    use_layout: Callable[[PagedLayout], None]
    store: RowStore
    directions: ValueDirections
    tensor_parallel: TensorParallel | None = None

    def run(self, layers: Sequence[Layer], positions: torch.Tensor, hidden: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """[N, d] embeddings -> hidden and residual [N, d] behind the last; those of rows that left say nothing."""
        hidden, residual = layers[0](positions, hidden, None)
        for number, layer in enumerate(layers):
            if number > 0:
                hidden, residual = self._layer(layer, number, len(layers), positions, hidden, residual)
            if self.gate is not None:
                self.gate.pass_layer(number, hidden, residual)
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
        computed = self._computed(layer, number, positions, hidden, residual)
        counts = self._counts(number)
        shadows = hidden.shape[0] - self.layout.slots.shape[0]
        index = computed.nonzero_static(size=sum(counts) + shadows).flatten()
        fresh, stream = hidden[index], residual[index]
        before = fresh.float() + stream.float() if self.rows is not None else None
        if len(index):
            in_text = index[: sum(counts)]
            self.use_layout(replace(self.layout, counts=counts, slots=self.layout.slots[in_text]))
            fresh, stream = layer(positions[index], fresh, stream)

        residual = residual + hidden
        hidden = torch.zeros_like(hidden)
        if self.rows is not None and before is not None:
            outputs = torch.zeros_like(hidden)
            outputs[index] = (fresh.float() + stream.float() - before).to(hidden.dtype)
            for r, (mine, place) in self.rows.kept.items():
                stored = self.store.of(self.slots[r], num_layers - 1, self.rows.capacity[r], hidden)[number - 1]
                stored[place] = torch.where(computed[mine].unsqueeze(1), outputs[mine], stored[place])
                hidden[mine] = stored[place]
        # Rows that were computed keep the layer's own split of the stream: other requests get what they always get.
        hidden[index], residual[index] = fresh, stream
        return hidden, residual

    def _counts(self, number: int) -> list[int]:
        """Rows of each request that this layer computes, known before which."""
        counts = self.layout.counts
        if self.rows is not None:
            counts = list(map(min, counts, self.rows.computed[number - 1]))
        if self.gate is not None:
            counts = list(map(min, counts, self.gate.rows.staying[number - 1]))
        return counts

    def _computed(
        self, layer: Layer, number: int, positions: torch.Tensor, hidden: torch.Tensor, residual: torch.Tensor
    ) -> torch.Tensor:
        """[N] bool: the rows that this layer computes. Writes the values of the compared ones."""
        rows = self.rows
        computed = torch.ones(hidden.shape[0], dtype=torch.bool, device=hidden.device)
        if self.gate is not None:
            computed[: self.gate.present.shape[0]] = self.gate.present
        if rows is None:
            return computed
        computed[: rows.stored.shape[0]] &= ~rows.stored
        if len(rows.compared):
            index = rows.compared
            distance = self._distance(layer, number, positions[index], hidden[index], residual[index])
            computed[index] = most_changed(distance, rows.request[index], rows.count[:, number - 1])
        return computed

    def _distance(
        self, layer: Layer, number: int, positions: torch.Tensor, hidden: torch.Tensor, residual: torch.Tensor
    ) -> torch.Tensor:
        """[n] float32, of the values of the compared rows from those in their pages, which they replace."""
        assert self.rows is not None
        slots, proxied = self.layout.slots[self.rows.compared], self.rows.proxied
        if proxied is None:
            value = layer.values(hidden, residual)
        else:
            key, value = layer.keys_and_values(positions, hidden, residual)
            write_keys(layer.pages, key[proxied[0]], slots[proxied[0]])
        old = swap_values(layer.pages, value, slots)
        distance = cosine_distance(self._all_reduce(change_parts(value, old)))
        if proxied is not None:
            some, rank = proxied
            pair = self.directions.components(number, layer, torch.stack([value[some], old[some]]))
            distance[some] = cosine_distance(change_parts(*leading(self._all_reduce(pair), rank)))
        return distance

    def _all_reduce(self, own_heads: torch.Tensor) -> torch.Tensor:
        """The sum over all heads; ranks hold different ones."""
        return own_heads if self.tensor_parallel is None else self.tensor_parallel.all_reduce(own_heads)
