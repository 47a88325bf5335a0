"""What a model's kernels are launched with: one layer of a refresh step in a graph, and the statistics behind it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from triton.backends.compiler import GPUTarget

from tests.triton.hopper import HOPPER, Launch, launches
from tests.triton.paged import Shape
from vllm_d2cache.graphs.step_graphs import StepBuffers, graph_sizes
from vllm_d2cache.ops.paged_attention import AttentionMaps, MapPlan, PagedLayout
from vllm_d2cache.ops.rollout import LayerRecord
from vllm_d2cache.ops.row_stats import RowParams
from vllm_d2cache.ops.triton import (
    attention,
    canvas_columns,
    density,
    packing,
    pages,
    rollout,
    rotary,
    row_filter,
    row_stats,
)

CPU = torch.device("cpu")
# Positions that a graph has room for.
MAX_LENGTH = 4096
# d2cache's own settings: masked positions, one commit, the rollout's share of the text.
CURRENT_K, ROLLOUT_P = 32, 0.1


@dataclass(frozen=True)
class Model:
    """What the kernels see of one."""

    shape: Shape
    vocab: int


MODELS = {
    "LLaDA-8B": Model(Shape(32, 32, 128, 16, torch.bfloat16), 126_464),
    "Dream-7B": Model(Shape(28, 4, 128, 16, torch.bfloat16), 152_064),
    "LLaDA-MoE": Model(Shape(16, 16, 128, 16, torch.bfloat16), 157_184),
}


def row_bound(length: int) -> int:
    """Rows that a request of ``length`` positions can need at most."""
    return min(length, CURRENT_K + 1 + math.ceil(ROLLOUT_P * length))


@dataclass
class GraphStep:
    """A refresh step of requests of one length, as a graph has it."""

    shape: Shape
    layout: PagedLayout
    plan: MapPlan
    positions: torch.Tensor

    @classmethod
    def make(cls, shape: Shape, length: int, requests: int = 1) -> GraphStep:
        """Of requests that use every row they may need."""
        bound = row_bound(length)
        blocks = -(-length // shape.block_size)
        table = torch.arange(requests * blocks, dtype=torch.int32).view(requests, blocks)
        positions = torch.arange(bound).repeat(requests)
        slots = table.long()[:, :1].repeat_interleave(bound, 0).flatten() * shape.block_size
        batch = PagedLayout([bound] * requests, [length] * requests, table, [-1] * requests, slots)
        size = next(s for s in graph_sizes(4096, 256) if s.rows >= len(slots) and s.requests >= requests)
        buffers = StepBuffers(size, MAX_LENGTH, shape.block_size, CPU)
        buffers.load(size, positions.int(), positions, batch, MapPlan.pack([(bound, length)] * requests))
        layout = buffers.layout(size)
        plan = MapPlan.pack([(n, t) for n, t in zip(layout.counts, layout.lengths, strict=True)])
        plan.read_on_device(buffers.map_starts[: size.requests + 1])
        return cls(shape, layout, plan, buffers.positions[: size.rows])

    def layer(self, target: GPUTarget = HOPPER) -> list[Launch]:
        """One layer: pages, output, maps, rollout."""
        shape, rows = self.shape, len(self.positions)
        cache = torch.empty(
            int(self.layout.block_table.max()) + 1,
            shape.kv_heads,
            shape.block_size,
            2 * shape.head_size,
            dtype=shape.dtype,
        )
        query = torch.empty(rows, shape.heads, shape.head_size, dtype=shape.dtype)
        fresh = torch.empty(rows, shape.kv_heads, shape.head_size, dtype=shape.dtype)
        maps = AttentionMaps(self.plan, torch.empty(self.plan.elements), torch.empty(rows, shape.heads))
        layer = LayerRecord(maps, query, cache, 0.1)
        wanted = [True] * len(self.layout.counts)
        turns = torch.empty(MAX_LENGTH, shape.head_size)
        with launches(target) as found:
            rotary.rotate_and_write(cache, query, fresh, fresh, self.positions, turns, self.layout.slots, query, fresh)
            pages.write_kv(cache, fresh, fresh, self.layout.slots)
            attention.paged_attention(query, cache, self.layout, 0.1, torch.empty_like(query), maps)
            rollout.batched_rollout(self.positions, [layer], self.layout, wanted, MAX_LENGTH, None)
        return found


def first_step(shape: Shape, length: int, target: GPUTarget = HOPPER) -> list[Launch]:
    """One layer of a request's first step, which computes its maps again."""
    table = torch.arange(-(-length // shape.block_size), dtype=torch.int32).unsqueeze(0)
    layout = PagedLayout([length], [length], table, [0], torch.arange(length))
    cache = torch.empty(table.shape[1], shape.kv_heads, shape.block_size, 2 * shape.head_size, dtype=shape.dtype)
    query = torch.empty(length, shape.heads, shape.head_size, dtype=shape.dtype)
    maps = AttentionMaps(MapPlan.pack([None]), torch.empty(0), torch.empty(length, shape.heads))
    layer = LayerRecord(maps, query, cache, 0.1)
    with launches(target) as found:
        attention.paged_attention(query, cache, layout, 0.1, torch.empty_like(query), maps)
        rollout.batched_rollout(torch.arange(length), [layer], layout, [True], length, None)
    return found


def row_params(rows: int, samples: bool, filters: bool) -> RowParams:
    """Of rows that are sampled and filtered, or not."""
    whole, ones = torch.zeros(rows, dtype=torch.int64), torch.ones(rows)
    return RowParams(ones, ones, whole, ones.double(), samples, filters)


def statistics(model: Model, target: GPUTarget = HOPPER) -> list[Launch]:
    """Behind the layers: greedy, and with everything that a request may ask for; the density."""
    logits = torch.empty(2, model.vocab, dtype=model.shape.dtype)
    with launches(target) as found:
        row_stats.tile_stats(logits, row_params(2, False, False), 7, False, False)
        row_stats.tile_stats(logits, row_params(2, True, True), 7, True, True)
        row_filter.filter_logits(logits.float(), torch.ones(2), torch.zeros(2, dtype=torch.int64), 7)
        density.certainty_density(torch.zeros(3, 256, dtype=torch.bool), torch.full((3,), 256), torch.full((3,), 10.0))
    return found


def columns(target: GPUTarget = HOPPER) -> list[Launch]:
    """Positions to canvas slots and back, and the packing of what was found."""
    places = torch.full((3,), 40)
    with launches(target) as found:
        for dtype in (torch.bool, torch.int64, torch.float32):
            canvas = canvas_columns.to_slots(torch.zeros(3, 1024, dtype=dtype), places, places, 256)
            canvas_columns.to_positions(canvas, places, places, 1024)
        packing.pack_columns(torch.zeros(3, 1024, dtype=torch.bool), places.cumsum(0) - 40, places, 120)
    return found


def every_kernel(model: Model, target: GPUTarget = HOPPER) -> list[Launch]:
    """Every kernel that a step of the model launches, each specialisation once."""
    found = [
        *GraphStep.make(model.shape, 1024).layer(target),
        *GraphStep.make(model.shape, 1024, requests=8).layer(target),
        *first_step(model.shape, 1024, target),
        *statistics(model, target),
        *columns(target),
    ]
    return list({launch.kernel.hash: launch for launch in found}.values())
