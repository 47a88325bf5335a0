"""What a forward pass leaves for the importance stage: attention maps, or the queries to compute them again.

A map [rows, T] of each layer is kept while a request refreshes a small part of its positions. In a step that
refreshes most of them (its first one) the map would be a T x T matrix; then each layer's queries [rows, heads, D] are
kept instead, the keys being in the cache anyway, and the map's rows are computed again a tile at a time.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar

import torch

from vllm_d2cache.canvas.rows import StepRows
from vllm_d2cache.canvas.states import CanvasStates
from vllm_d2cache.mechanisms.base import KEYS, ROWS, Finding, Hook, Mechanism, Members, RequestSize, Use, Worker
from vllm_d2cache.ops.dispatch import chosen
from vllm_d2cache.ops.paged_attention import AttentionMaps, MapPlan, PagedLayout
from vllm_d2cache.ops.rollout import LayerRecord, TensorParallel, batched_rollout

# A map is kept while rows * _MAP_SHARE <= T. A graph takes requests whose bound is that low: they keep theirs anyway.
_MAP_SHARE = 4
# So is a map of few elements, whatever its shape: less memory than its queries in a large model, and no second pass.
_SMALL_MAP = 1 << 14
# A larger one is not kept, as it grows with T x T: what a quarter of 4,096 positions has, the longest text of a graph.
_LARGE_MAP = 1 << 22
# Where PyTorch works out the rollout, maps of at most so many elements go into one product with those of mates: alone
# they take longer to ask for than to compute. Their rows are padded, to less than twice the memory (docs/log.md).
_MOST_GROUPED = 1 << 16


class MapPool:
    """Scratch memory for attention maps, reused from step to step."""

    def __init__(self) -> None:
        self._memory: dict[int, torch.Tensor] = {}

    def take(self, layer: int, elements: int, device: torch.device) -> torch.Tensor:
        """Flat float32 memory of the layer, at least that long; contents undefined."""
        memory = self._memory.pop(layer, None)
        if memory is None or memory.numel() < elements:
            del memory  # makes room for its successor
            memory = torch.empty(with_slack(elements), device=device)
        self._memory[layer] = memory
        return memory


@dataclass
class ImportanceCapture(Hook):
    """Filled layer by layer during one forward pass.

    Attributes:
        wanted: for each request of the batch, whether its policy reads importance.
        positions: [N] int64, refreshed position of each row.
        tensor_parallel: None on a single rank.
        bounds: what decides in place of ``layout.counts`` who keeps a map; in a graph those are capacities.
        request: [N] int64, whose each row is; None = not known on the device.
    """

    layout: PagedLayout
    wanted: list[bool]
    positions: torch.Tensor
    pool: MapPool
    tensor_parallel: TensorParallel | None = None
    bounds: list[int] | None = None
    request: torch.Tensor | None = None
    layers: list[LayerRecord] = field(default_factory=list)

    @cached_property
    def plan(self) -> MapPlan:
        """Which requests keep their maps in this step."""
        layout = self.layout
        kept = [w and keeps_map(b, t) for w, b, t in zip(self.wanted, self._bounds, layout.lengths, strict=True)]
        shapes = zip(layout.counts, layout.lengths, kept, strict=True)
        most = _MOST_GROUPED if chosen(layout.slots.device) == "torch" else 0
        return MapPlan.pack([(n, t) if keep else None for n, t, keep in shapes], layout.numbers, most)

    @property
    def _bounds(self) -> list[int]:
        return self.layout.counts if self.bounds is None else self.bounds

    @cached_property
    def _replays(self) -> bool:
        """Whether some request leaves queries instead of maps."""
        return any(w and shape is None for w, shape in zip(self.wanted, self.plan.shapes, strict=True))

    def start_layer(
        self, query: torch.Tensor, kv_cache: torch.Tensor, scale: float, layout: PagedLayout | None = None
    ) -> AttentionMaps:
        """Register a layer; returns where the attention op is to leave its maps.

        Args:
            layout: of the layer's own rows; None = all of the step's.
        """
        plan = self.plan
        lse = None
        if self._replays and chosen(query.device) != "torch":
            lse = query.new_empty(query.shape[:2], dtype=torch.float32)
        maps = AttentionMaps(plan, self.pool.take(len(self.layers), plan.elements, query.device), lse)
        # The runner may use the buffer again in the next layer.
        kept = query.clone() if self._replays else None
        self.layers.append(LayerRecord(maps, kept, kv_cache, scale, layout or self.layout))
        return maps

    def maps(self, query: torch.Tensor, kv_cache: torch.Tensor, scale: float, layout: PagedLayout) -> AttentionMaps:
        return self.start_layer(query, kv_cache, scale, layout)

    def importance(self, num_positions: int) -> torch.Tensor | None:
        """[R, num_positions] float32 rollout of the requests that want it (0 elsewhere); None if none does."""
        if not any(self.wanted):
            return None
        for i, layer in enumerate(self.layers):
            self.layers[i] = self._at_full_rows(layer)  # one at a time: the queries of all layers are large
        place = (self.layout, self.wanted, num_positions, self.tensor_parallel, self.request)
        return batched_rollout(self.positions, self.layers, *place)

    def _at_full_rows(self, layer: LayerRecord) -> LayerRecord:
        """The layer as if it had computed all rows of the step: some policies of mates leave rows out of a layer."""
        if layer.queries is None or layer.layout is None or layer.layout is self.layout:
            return layer
        query, lse = layer.queries, layer.maps.lse
        full = query.new_zeros(sum(self.layout.counts), *query.shape[1:])
        full_lse = None if lse is None else lse.new_zeros(full.shape[:2])
        at = own = 0
        for wanted, count, computed in zip(self.wanted, self.layout.counts, layer.layout.counts, strict=True):
            if wanted:
                full[at : at + count] = query[own : own + count]
                if full_lse is not None and lse is not None:
                    full_lse[at : at + count] = lse[own : own + count]
            at, own = at + count, own + computed
        return replace(layer, maps=replace(layer.maps, lse=full_lse), queries=full, layout=self.layout)


def keeps_map(bound: int, length: int) -> bool:
    """Whether a request of ``length`` positions that can need ``bound`` rows keeps its maps."""
    elements = bound * length
    return elements <= _SMALL_MAP or (bound * _MAP_SHARE <= length and elements <= _LARGE_MAP)


def map_bytes(num_layers: int, bound: int, length: int) -> int:
    """Bytes that the pool takes for the maps of a request of ``length`` positions that can need ``bound`` rows.

    Its first step has all positions as rows.
    """
    shared = min(length // _MAP_SHARE, _LARGE_MAP // length)
    most = length if keeps_map(length, length) else min(bound, max(shared, _SMALL_MAP // length))
    return num_layers * with_slack(most * length) * torch.float32.itemsize


def with_slack(elements: int) -> int:
    """Rounded up so that a slowly growing need does not allocate in every step."""
    return elements + elements // 4


@dataclass(frozen=True)
class ReadsImportance(Use):
    """Attention rollout is worked out in every step."""

    name: ClassVar[str] = "attention importance"
    needs: ClassVar[frozenset[str]] = frozenset({KEYS, ROWS})
    takes_padding: ClassVar[bool] = True

    def make(self, worker: Worker) -> ImportanceMaps:
        return ImportanceMaps(worker)

    def request_bytes(self, size: RequestSize) -> int:
        """Its maps."""
        return map_bytes(size.layers, size.row_budget, size.length)


@dataclass(frozen=True)
class Importance(Finding):
    """How much attention each position receives, through all layers."""

    values: torch.Tensor  # [R, T] float32; lines of requests that do not read it hold anything


class ImportanceMaps(Mechanism):
    """Memory for the maps of a step."""

    pool: MapPool

    def tables(self) -> dict[str, Any]:
        return {"pool": MapPool()}

    def open(self, rows: StepRows, members: Members, canvas: CanvasStates) -> ImportanceHook:
        wanted = [r in members for r in range(len(rows.slots))]
        return ImportanceHook(wanted, rows.text_positions, rows.request, self.pool, self.worker.tensor_parallel)


@dataclass
class ImportanceHook(Hook):
    """The capture of one forward pass."""

    wanted: list[bool]
    positions: torch.Tensor  # [N - S] int64
    request: torch.Tensor  # [N - S] int64
    pool: MapPool
    tensor_parallel: TensorParallel | None

    def place(self, layout: PagedLayout) -> None:
        self.capture = ImportanceCapture(
            layout, self.wanted, self.positions, self.pool, self.tensor_parallel, request=self.request
        )

    def maps(self, query: torch.Tensor, kv_cache: torch.Tensor, scale: float, layout: PagedLayout) -> AttentionMaps:
        return self.capture.start_layer(query, kv_cache, scale, layout)

    def result(self, num_positions: int) -> Importance | None:
        values = self.capture.importance(num_positions)
        return None if values is None else Importance(values)
