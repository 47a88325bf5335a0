"""Refresh steps as CUDA graphs: the forward pass and the rollout, captured once for each of a few numbers of rows.

A graph replays the same kernels on the same memory. So everything that differs from batch to batch is copied into
buffers that stay (StepBuffers), grids go by capacities, and the kernels read on the device how much of them is used.
Batches are ragged: a graph knows the sum of their rows, not how the requests share it. Rows to spare belong to one
more request, without text, at the end.

How a graph is recorded is the caller's affair: engine/cuda_graphs.py, or tests/graph_emulator.py without a GPU.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate

import torch

from vllm_d2cache.canvas.rows import StepRows
from vllm_d2cache.mechanisms.base import Hook, Use
from vllm_d2cache.mechanisms.importance import (
    Importance,
    ImportanceCapture,
    MapPool,
    ReadsImportance,
    keeps_map,
    with_slack,
)
from vllm_d2cache.ops.host import upload
from vllm_d2cache.ops.paged_attention import MapPlan, PagedLayout
from vllm_d2cache.ops.rollout import TensorParallel

Forward = Callable[[torch.Tensor, torch.Tensor, PagedLayout, ImportanceCapture], torch.Tensor]
"""The network: [N] int32 token ids at [N] int64 positions, layout and capture -> [N, d] final hidden states."""

Recorder = Callable[[Callable[[], None]], Callable[[], None]]
"""Records what the function does on the device, and returns what does it again."""

# Longest text that a graph with maps serves: [rows, length] of every layer lie in its memory.
MAX_LENGTH = 4096
# A graph has room for one request for each so many rows; with default options one has 34 or more. Room that is not
# used is programs that find nothing to do.
ROWS_PER_REQUEST = 16
# What a row has of activations at a time, in widths of the network: two residual streams, q, k, v, both halves of the
# MLP and their product. And what a graph of some 500 kernels takes beside its tensors. Neither is measured.
_ACTIVATION_WIDTHS = 16
_DRIVER_BYTES = 4 << 20


@dataclass(frozen=True)
class GraphSize:
    """What a graph has room for."""

    rows: int
    requests: int


def graph_length(max_length: int, block: int) -> int:
    """Longest text of graphs, where requests have ``max_length``; in blocks (``block``, 0 = none) there are no maps."""
    return max_length if block else min(MAX_LENGTH, max_length)


def graph_sizes(max_rows: int, max_requests: int, block: int = 0) -> list[GraphSize]:
    """Sizes up to ``max_rows``, ascending: 16 rows apart, later an eighth, so that no more than that is padding.

    Args:
        block: positions of a block where texts are cut into blocks (two are the rows of a request); 0 = they are not.
    """
    each = min(ROWS_PER_REQUEST, 2 * block) if block else ROWS_PER_REQUEST
    counts = []
    rows = 16
    while rows < max_rows:
        counts.append(rows)
        rows += max(16, rows // 128 * 16)
    counts += [max_rows] if max_rows else []
    return [GraphSize(n, max(1, min(n // each, max_requests))) for n in counts]


def graph_bytes(
    sizes: list[GraphSize], max_length: int, layers: int, hidden_size: int, itemsize: int, block: int = 0
) -> int:
    """Bytes that the graphs of these sizes hold, buffers included; activations and what a driver takes are estimates.

    Args:
        max_length: most positions a request can have.
        itemsize: bytes of a number of the model's type.
        block: as for :func:`graph_sizes`.
    """
    if not sizes:
        return 0
    rows, requests = sizes[-1].rows, sizes[-1].requests + 1
    length = graph_length(max_length, block)
    buffers = rows * (24 + hidden_size * itemsize) + requests * length * 5
    maps = 0 if block else layers * with_slack(rows * length) * torch.float32.itemsize
    activations = rows * _ACTIVATION_WIDTHS * hidden_size * itemsize
    return buffers + maps + activations + len(sizes) * _DRIVER_BYTES


class StepBuffers:
    """Memory that graphs read and write; the same for all of them, as one runs at a time.

    Args:
        size: of the largest graph.
        max_length: most positions a request can have.
        block_size: positions of a KV block.
        block: as for :func:`graph_sizes`. Rows then have limits, and nobody reads importance.
    """

    def __init__(self, size: GraphSize, max_length: int, block_size: int, device: torch.device, block: int = 0) -> None:
        self.max_length, self.device, self.block = max_length, device, block
        requests = size.requests + 1  # and the one that rows to spare belong to
        self.input_ids = torch.zeros(size.rows, dtype=torch.int32, device=device)
        self.positions = torch.zeros(size.rows, dtype=torch.int64, device=device)
        self.slots = torch.full((size.rows,), -1, device=device)
        self.block_table = torch.zeros(requests, -(-max_length // block_size), dtype=torch.int32, device=device)
        self.row_starts = torch.zeros(requests + 1, dtype=torch.int32, device=device)
        self.text_lengths = torch.zeros(requests, dtype=torch.int32, device=device)
        self.map_starts = torch.full((requests,), -1, device=device)
        self.importance = torch.zeros(requests, 0 if block else max_length, device=device)
        self.limits = torch.zeros(size.rows, dtype=torch.int32, device=device) if block else None
        self.hidden: torch.Tensor | None = None  # [rows, d], made when the first graph shows d

    def load(
        self, size: GraphSize, input_ids: torch.Tensor, positions: torch.Tensor, layout: PagedLayout, plan: MapPlan
    ) -> None:
        """Copy a batch that fits ``size`` here. Nothing waits for the device.

        Args:
            input_ids, positions: [n] of the batch's rows.
            layout: of the batch.
            plan: its maps.
        """
        count, requests = positions.shape[0], len(layout.counts)
        assert count <= size.rows
        assert requests <= size.requests
        self.input_ids[:count] = input_ids
        self.positions[:count] = positions
        self.slots[: size.rows].fill_(-1)
        self.slots[:count] = layout.slots
        if self.limits is not None and layout.limits is not None:
            self.limits[:count] = layout.limits
        width = min(layout.block_table.shape[1], self.block_table.shape[1])
        self.block_table[:requests, :width] = layout.block_table[:requests, :width]
        spare = size.requests - requests
        starts = [*accumulate(layout.counts, initial=0), *[count] * spare, size.rows]
        numbers = [*starts, *layout.lengths, *[0] * (spare + 1), *plan.starts, *[-1] * (spare + 1)]
        packed = upload(numbers, torch.int64, self.device)
        n = size.requests + 1
        self.row_starts[: n + 1], self.text_lengths[:n], self.map_starts[:n] = packed.split([n + 1, n, n])

    def layout(self, size: GraphSize) -> PagedLayout:
        """The buffers as a layout: what its lists say on the host are capacities."""
        n = size.requests + 1
        counts = [0] * size.requests + [size.rows]
        limits = None if self.limits is None else self.limits[: size.rows]
        where = (self.block_table[:n], [-1] * n, self.slots[: size.rows])
        layout = PagedLayout(counts, [self.max_length] * n, *where, limits=limits)
        layout.read_on_device(self.row_starts[: n + 1], self.text_lengths[:n])
        return layout

    def store_hidden(self, hidden: torch.Tensor, max_rows: int) -> None:
        """Keep the result of the forward pass [N, d]."""
        if self.hidden is None:
            self.hidden = hidden.new_zeros(max_rows, hidden.shape[1])
        self.hidden[: hidden.shape[0]] = hidden


@dataclass(frozen=True)
class GraphStep(Hook):
    """One step by a graph: ``replay`` in place of the forward pass, then what it has found out."""

    replay: Callable[[], torch.Tensor]
    importance: torch.Tensor | None  # [R, max length] float32, None where no request reads it

    def result(self, num_positions: int) -> Importance | None:
        return None if self.importance is None else Importance(self.importance[:, :num_positions])


class StepGraphs:
    """The graphs of one worker.

    Args:
        sizes: ascending.
        buffers: with room for the largest.
        forward: runs the network eagerly.
        record: see Recorder.
    """

    def __init__(
        self,
        sizes: list[GraphSize],
        buffers: StepBuffers,
        forward: Forward,
        record: Recorder,
        tensor_parallel: TensorParallel | None = None,
    ) -> None:
        self.sizes, self.buffers = sizes, buffers
        self.forward, self.tensor_parallel, self._record = forward, tensor_parallel, record
        self._replay: dict[GraphSize, Callable[[], None]] = {}

    def capture(self) -> None:
        """Record all sizes, the largest first, so that the others find its memory."""
        buffers = self.buffers
        nothing = PagedLayout([], [], buffers.block_table[:0], [], buffers.slots[:0])
        for size in reversed(self.sizes):
            # A batch without requests: all rows are padding.
            buffers.load(size, buffers.input_ids[:0], buffers.positions[:0], nothing, MapPlan.pack([]))
            self._replay[size] = self._record(partial(self._step, size))

    def _step(self, size: GraphSize) -> None:
        """What is recorded. It must not look at the batch in the buffers but on the device."""
        buffers = self.buffers
        layout, positions = buffers.layout(size), buffers.positions[: size.rows]
        n = size.requests + 1
        # Whoever wants no map has none to push its vector through.
        reads = not buffers.block
        capture = ImportanceCapture(layout, [reads] * n, positions, MapPool(), self.tensor_parallel, [0] * n)
        if reads:
            capture.plan.read_on_device(buffers.map_starts[:n])
        hidden = self.forward(buffers.input_ids[: size.rows], positions, layout, capture)
        buffers.store_hidden(hidden, self.sizes[-1].rows)
        importance = capture.importance(buffers.max_length)
        if importance is not None:
            buffers.importance[:n] = importance

    def fitting(
        self, counts: Sequence[int], lengths: Sequence[int], uses: Sequence[tuple[Use, ...]]
    ) -> GraphSize | None:
        """The smallest graph for a batch; None where it has to run eagerly.

        Args:
            counts: rows of each request, padding included.
            lengths: positions of each request that its rows can see.
            uses: likewise; who reads importance must keep its maps, as queries are not recorded. In blocks nobody may.
        """
        recorded = all(isinstance(use, ReadsImportance) and not self.buffers.block for mine in uses for use in mine)
        if not recorded or max(lengths) > self.buffers.max_length:
            return None
        kept = zip(counts, lengths, _reads_importance(uses), strict=True)
        if any(reads and not keeps_map(count, length) for count, length, reads in kept):
            return None
        start = bisect_left(self.sizes, sum(counts), key=lambda size: size.rows)
        return next((size for size in self.sizes[start:] if size.requests >= len(counts)), None)

    def step(self, size: GraphSize, rows: StepRows, layout: PagedLayout, uses: Sequence[tuple[Use, ...]]) -> GraphStep:
        """Load a batch that :meth:`fitting` gave ``size``."""
        reading = _reads_importance(uses)
        kept = zip(layout.counts, layout.lengths, reading, strict=True)
        plan = MapPlan.pack([(n, t) if reads else None for n, t, reads in kept])
        self.buffers.load(size, rows.input_ids, rows.positions, layout, plan)
        result = self.buffers.importance[: len(layout.counts)] if any(reading) else None
        return GraphStep(partial(self.run, size), result)

    def run(self, size: GraphSize) -> torch.Tensor:
        """Replay a graph on what :meth:`StepBuffers.load` has put there; [rows, d] hidden states."""
        self._replay[size]()
        assert self.buffers.hidden is not None
        return self.buffers.hidden[: size.rows]


def _reads_importance(uses: Sequence[tuple[Use, ...]]) -> list[bool]:
    """Of each request, whether it needs the rollout that a graph works out."""
    return [any(isinstance(use, ReadsImportance) for use in mine) for mine in uses]
