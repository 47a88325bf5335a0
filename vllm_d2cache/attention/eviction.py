"""Key sets that differ from layer to layer: chosen in one step of a request, attended to in later ones."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from vllm_d2cache.attention.capture import TensorParallel
from vllm_d2cache.ops.key_choice import choose_keys, mean_query_scores
from vllm_d2cache.ops.paged_attention import PagedLayout, read_kv
from vllm_d2cache.records import KeyChoice

# Slot -> of each layer, the positions it keeps: [n] int64 ascending.
KeptBySlot = dict[int, list[torch.Tensor]]


@dataclass
class LayerKeys:
    """Gives each layer of one forward pass its keys.

    Attributes:
        choices: of each request, or None where all layers have the layout's keys.
        slots: of the requests.
        kept: what earlier steps left; changed in steps that choose.
        tensor_parallel: None on a single rank.
    """

    layout: PagedLayout
    choices: list[KeyChoice | None]
    slots: list[int]
    kept: KeptBySlot
    tensor_parallel: TensorParallel | None = None
    layer: int = 0

    def start_layer(self, query: torch.Tensor, kv_cache: torch.Tensor) -> PagedLayout:
        """The layout of the next layer; a request that chooses attends to everything and leaves its choice behind.

        Args:
            query: [N, heads, head size] of the rows of all requests; their K and V are in the cache.
        """
        keys = list(self.layout.keys or [None] * len(self.choices))
        offset = 0
        for r, choice in enumerate(self.choices):
            rows = query[offset : offset + self.layout.counts[r]]
            offset += self.layout.counts[r]
            if choice is None:
                continue
            if choice.choose:
                self._choose(r, choice, rows[choice.queries], kv_cache)
            else:
                keys[r] = torch.cat([choice.visible, self.kept[self.slots[r]][self.layer]]).sort().values
        self.layer += 1
        return replace(self.layout, keys=keys)

    def _choose(self, r: int, choice: KeyChoice, query: torch.Tensor, kv_cache: torch.Tensor) -> None:
        scores = mean_query_scores(query, read_kv(kv_cache, self.layout, r)[0])
        if self.tensor_parallel is not None:
            # Ranks hold different heads; all have to keep the same keys.
            scores = self.tensor_parallel.all_reduce(scores) / self.tensor_parallel.size
        outside = torch.ones_like(scores, dtype=torch.bool)
        outside[choice.visible] = False
        places = outside.nonzero().flatten()
        if self.layer == 0:
            self.kept[self.slots[r]] = []
        self.kept[self.slots[r]].append(places[choose_keys(scores[places], choice.count, choice.pool)])
