"""What a forward pass leaves for the importance stage: attention maps, or the queries to compute them again.

A map [rows, T] of each layer is kept while a request refreshes a small part of its positions. In a step that
refreshes most of them (its first one) the map would be a T x T matrix; then each layer's queries [rows, heads, D] are
kept instead, the keys being in the cache anyway, and the map's rows are computed again a tile at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from vllm_d2cache.ops.paged_attention import PagedLayout, attention_map_product, read_kv
from vllm_d2cache.ops.rollout import PushBack, push_back_map, rollout

# A map is kept while rows * _MAP_SHARE <= T.
_MAP_SHARE = 4


class MapPool:
    """Scratch memory for attention maps, reused from step to step."""

    def __init__(self) -> None:
        self._memory: dict[int, torch.Tensor] = {}

    def take(self, layer: int, shapes: list[tuple[int, int]], device: torch.device) -> list[torch.Tensor]:
        """One float32 tensor of each shape, side by side in the layer's memory; contents undefined."""
        need = sum(n * t for n, t in shapes)
        memory = self._memory.get(layer)
        if memory is None or memory.numel() < need:
            # Rounded up so that a slowly growing need does not allocate in every step.
            memory = torch.empty(need + need // 4, device=device)
            self._memory[layer] = memory
        views, offset = [], 0
        for n, t in shapes:
            views.append(memory[offset : offset + n * t].view(n, t))
            offset += n * t
        return views


@dataclass(frozen=True)
class TensorParallel:
    """How ranks that hold different heads agree."""

    size: int
    all_reduce: Callable[[torch.Tensor], torch.Tensor]  # sum over the ranks


@dataclass
class ImportanceCapture:
    """Filled layer by layer during one forward pass.

    Attributes:
        wanted: for each request of the batch, whether its policy reads importance.
        positions: [N] int64, refreshed position of each row.
        tensor_parallel: None on a single rank.
    """

    layout: PagedLayout
    wanted: list[bool]
    positions: torch.Tensor
    pool: MapPool
    tensor_parallel: TensorParallel | None = None
    maps: list[list[torch.Tensor | None]] = field(default_factory=list)
    queries: list[list[torch.Tensor | None]] = field(default_factory=list)
    caches: list[tuple[torch.Tensor, float]] = field(default_factory=list)

    def _keeps_map(self, r: int) -> bool:
        return self.wanted[r] and self.layout.counts[r] * _MAP_SHARE <= self.layout.lengths[r]

    def start_layer(self, query: torch.Tensor, kv_cache: torch.Tensor, scale: float) -> list[torch.Tensor | None]:
        """Register a layer; returns where the attention op is to leave each request's map, or None."""
        requests = range(len(self.wanted))
        kept = [r for r in requests if self._keeps_map(r)]
        shapes = [(self.layout.counts[r], self.layout.lengths[r]) for r in kept]
        maps: list[torch.Tensor | None] = [None] * len(self.wanted)
        for r, view in zip(kept, self.pool.take(len(self.maps), shapes, query.device), strict=True):
            maps[r] = view
        queries: list[torch.Tensor | None] = [None] * len(self.wanted)
        offset = 0
        for r in requests:
            if self.wanted[r] and maps[r] is None:
                queries[r] = query[offset : offset + self.layout.counts[r]].clone()
            offset += self.layout.counts[r]
        self.maps.append(maps)
        self.queries.append(queries)
        self.caches.append((kv_cache, scale))
        return maps

    def importance(self, num_positions: int) -> torch.Tensor | None:
        """[R, num_positions] float32 rollout of the requests that want it (0 elsewhere); None if none does."""
        if not any(self.wanted):
            return None
        out = torch.zeros(len(self.wanted), num_positions, device=self.positions.device)
        offset = 0
        for r, count in enumerate(self.layout.counts):
            rows = self.positions[offset : offset + count]
            offset += count
            if self.wanted[r]:
                layers = (self._push_back(layer, r) for layer in reversed(range(len(self.maps))))
                length = self.layout.lengths[r]
                out[r, :length] = rollout(layers, rows, length)
        return out

    def _push_back(self, layer: int, r: int) -> PushBack:
        own_heads = self._own_heads(layer, r)
        if self.tensor_parallel is None:
            return own_heads
        size, all_reduce = self.tensor_parallel.size, self.tensor_parallel.all_reduce

        def push_back(u: torch.Tensor, v: torch.Tensor) -> None:
            # The mean over all heads is the mean of the ranks' means; u is the same on every rank, so reducing the
            # product [T] does for reducing the map [q, T].
            v += all_reduce(_product(own_heads, u, v)) / size

        return push_back

    def _own_heads(self, layer: int, r: int) -> PushBack:
        """The layer under the heads of this rank."""
        stored = self.maps[layer][r]
        if stored is not None:
            return push_back_map(stored)
        query = self.queries[layer][r]
        assert query is not None
        kv_cache, scale = self.caches[layer]
        key, _ = read_kv(kv_cache, self.layout, r)

        def push_back(u: torch.Tensor, v: torch.Tensor) -> None:
            attention_map_product(query, key, scale, u, v)

        return push_back


def _product(push_back: PushBack, u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """What ``push_back`` would add to ``v``."""
    product = torch.zeros_like(v)
    push_back(u, product)
    return product


def most_map_bytes(num_layers: int, length: int) -> int:
    """Bytes of all layers' maps that one request of ``length`` positions can leave in a step, at most."""
    return num_layers * (length // _MAP_SHARE) * length * torch.float32.itemsize
