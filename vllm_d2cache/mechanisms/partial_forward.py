"""A forward pass whose layers compute a part of its rows: the hooks of the step say which.

Rows that no hook lets a layer compute keep their place in the stream. Rows behind the text are always computed. A layer
is whatever has the interface below.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from vllm_d2cache.mechanisms.base import Hook
from vllm_d2cache.ops.paged_attention import PagedLayout

# Rows whose outputs are worked out in fp32 at one time.
ROWS_AT_ONCE = 1024


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


@dataclass(frozen=True)
class BeforeLayer:
    """All rows of a step before one layer."""

    number: int
    num_layers: int
    layer: Layer
    positions: torch.Tensor  # [N] int64
    hidden: torch.Tensor  # [N, d]
    residual: torch.Tensor  # [N, d]
    slots: torch.Tensor  # [N - S] int64, flat KV slot of each


class RowHook(Hook):
    """A hook that says which rows a layer computes."""

    chooses_rows = True
    keeps_outputs = False
    """Whether it wants what a layer adds to the stream."""

    def counts(self, number: int, counts: list[int]) -> list[int]:
        """Rows of each request that layer ``number`` computes; known on the host."""
        return counts

    def narrow(self, at: BeforeLayer, computed: torch.Tensor) -> None:
        """Take rows out of ``computed`` [N] bool, which the layer computes; changed in place."""

    def stand_in(self, at: BeforeLayer, computed: torch.Tensor, outputs: torch.Tensor, hidden: torch.Tensor) -> None:
        """Put into ``hidden`` [N, d] what rows add that were not computed; ``outputs`` [N, d] of those that were."""

    def behind(self, number: int, hidden: torch.Tensor, residual: torch.Tensor) -> None:
        """All rows [N, d] are behind layer ``number``."""


@dataclass
class PartialForward:
    """Runs the layers of one forward pass.

    Attributes:
        layout: of all rows of the step.
        use_layout: tells attention whose rows the next layer has.
    """

    hooks: list[RowHook]
    layout: PagedLayout
    use_layout: Callable[[PagedLayout], None]

    def run(self, layers: Sequence[Layer], positions: torch.Tensor, hidden: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """[N, d] embeddings -> hidden and residual [N, d] behind the last; those of rows that left say nothing."""
        counts = [self._counts(number) for number in range(len(layers))]
        for rows in counts:
            self.layout.expect_rows(rows)
        hidden, residual = layers[0](positions, hidden, None)
        for number, layer in enumerate(layers):
            if number > 0:
                at = BeforeLayer(number, len(layers), layer, positions, hidden, residual, self.layout.slots)
                hidden, residual = self._layer(at, counts[number])
            for hook in self.hooks:
                hook.behind(number, hidden, residual)
        self.use_layout(self.layout)
        return hidden, residual

    def _counts(self, number: int) -> list[int]:
        counts = self.layout.counts
        if number > 0:
            for hook in self.hooks:
                counts = hook.counts(number, counts)
        return counts

    def _layer(self, at: BeforeLayer, counts: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        computed = torch.ones(at.hidden.shape[0], dtype=torch.bool, device=at.hidden.device)
        for hook in self.hooks:
            hook.narrow(at, computed)
        behind = at.hidden.shape[0] - at.slots.shape[0]
        index = computed.nonzero_static(size=sum(counts) + behind).flatten()
        fresh, stream = at.hidden[index], at.residual[index]
        keepers = [hook for hook in self.hooks if hook.keeps_outputs]
        before = fresh.float() + stream.float() if keepers else None
        if len(index):
            in_text = index[: sum(counts)]
            self.use_layout(replace(self.layout, counts=counts, slots=at.slots[in_text]))
            fresh, stream = at.layer(at.positions[index], fresh, stream)
        residual = at.residual + at.hidden
        hidden = torch.zeros_like(at.hidden)
        if before is not None:
            outputs = torch.zeros_like(hidden)
            for first in range(0, len(index), ROWS_AT_ONCE):
                rows = slice(first, first + ROWS_AT_ONCE)
                outputs[index[rows]] = (fresh[rows].float() + stream[rows].float() - before[rows]).to(hidden.dtype)
            del before  # makes room for what hooks take
            for hook in keepers:
                hook.stand_in(at, computed, outputs, hidden)
        # Rows that were computed keep the layer's own split of the stream: other requests get what they always get.
        hidden[index], residual[index] = fresh, stream
        return hidden, residual
