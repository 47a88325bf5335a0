"""Microbenchmarks of every kernel at real shapes, against its PyTorch twin, a fused stand-in, and its own floor."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.gpu.timing import Ceilings, Clock
from vllm_d2cache.ops import density, paged_attention, rollout, rotary, row_stats, xformers_attention
from vllm_d2cache.ops.paged_attention import AttentionMaps, AttentionShape, MapPlan, PagedLayout, read_kv
from vllm_d2cache.ops.rollout import LayerRecord
from vllm_d2cache.ops.row_stats import RowParams
from vllm_d2cache.ops.triton import attention as attention_kernels
from vllm_d2cache.ops.triton import density as density_kernels
from vllm_d2cache.ops.triton import pages as page_kernels
from vllm_d2cache.ops.triton import rollout as rollout_kernels
from vllm_d2cache.ops.triton import rotary as rotary_kernels
from vllm_d2cache.ops.triton import row_stats as row_stats_kernels

BLOCK_SIZE = 16
CANVAS = 256
CURRENT_K, ROLLOUT_P = 32, 0.1


@dataclass(frozen=True)
class Family:
    """What the kernels see of a model."""

    name: str
    heads: int
    kv_heads: int
    head_size: int
    layers: int
    vocab: int


FAMILIES = (Family("LLaDA-8B", 32, 32, 128, 32, 126_464), Family("Dream-7B", 28, 4, 128, 28, 152_064))
TINY = (Family("tiny", 4, 2, 32, 2, 200),)


@dataclass
class Line:
    """One line of the table."""

    kernel: str
    family: str
    requests: int
    rows: int  # of each request
    length: int  # T of each request
    ms: float
    floor_ms: float
    twin_ms: float | None  # the PyTorch twin on the same device
    other: str = ""  # what else was timed
    other_ms: float | None = None

    @property
    def ratio(self) -> float:
        """1 is the limit of the card."""
        return self.ms / self.floor_ms


class Batch:
    """Requests of one length that refresh the same number of rows, in shuffled KV blocks."""

    def __init__(self, family: Family, requests: int, rows: int, length: int, device: torch.device) -> None:
        self.family, self.requests, self.rows, self.length = family, requests, rows, length
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        blocks = -(-length // BLOCK_SIZE)
        table = (torch.randperm(requests * blocks) + 1).view(requests, blocks).int().to(device)
        shape = (family.kv_heads, requests * blocks + 1, BLOCK_SIZE, 2 * family.head_size)
        self.cache = torch.randn(shape, dtype=self.dtype, device=device).transpose(0, 1)
        positions = torch.stack([torch.randperm(length)[:rows].sort().values for _ in range(requests)]).to(device)
        slots = table.long().gather(1, positions // BLOCK_SIZE) * BLOCK_SIZE + positions % BLOCK_SIZE
        self.positions = positions.flatten()
        counts, lengths = [rows] * requests, [length] * requests
        self.layout = PagedLayout(counts, lengths, table, [-1] * requests, slots.flatten())
        n = requests * rows
        self.query = torch.randn(n, family.heads, family.head_size, dtype=self.dtype, device=device)
        self.fresh = torch.randn(2, n, family.kv_heads, family.head_size, dtype=self.dtype, device=device)
        self.output = torch.empty_like(self.query)
        self.lse = torch.empty(n, family.heads, device=device)
        self.scale = family.head_size**-0.5

    def maps(self, kept: bool, keep_lse: bool = True) -> AttentionMaps:
        """Memory for the maps of all requests, or none."""
        plan = MapPlan.pack([(self.rows, self.length) if kept else None] * self.requests)
        memory = torch.zeros(plan.elements, device=self.query.device)
        return AttentionMaps(plan, memory, self.lse if keep_lse else None)

    @property
    def key_bytes(self) -> int:
        """Keys of all requests in one layer."""
        f = self.family
        return self.requests * self.length * f.kv_heads * f.head_size * self.query.element_size()

    @property
    def half_flops(self) -> int:
        """Of one of the two products of attention, in one layer."""
        return 2 * self.requests * self.rows * self.length * self.family.heads * self.family.head_size


def refreshed_rows(length: int) -> int:
    """Rows of a d2Cache step at its bound: masked positions, one commit, the rollout's share."""
    return min(length, CURRENT_K + 1 + int(ROLLOUT_P * length))


class Bench:
    """Times kernels; ``twins`` also the PyTorch twins, which take long at large shapes."""

    def __init__(self, clock: Clock, limits: Ceilings, twins: bool = True) -> None:
        self.clock, self.limits, self.twins = clock, limits, twins
        self.left_out: list[str] = []  # what cannot run here, and why

    def line(
        self,
        kernel: str,
        batch: Batch,
        call: Callable[[], Any],
        num_bytes: float,
        flops: float = 0,
        twin: Callable[[], Any] | None = None,
        other: tuple[str, Callable[[], Any]] | None = None,
    ) -> Line:
        """Time a kernel, its twin and what else it may be compared with."""
        return Line(
            kernel,
            batch.family.name,
            batch.requests,
            batch.rows,
            batch.length,
            self.clock(call),
            self.limits.floor_ms(num_bytes, flops),
            self.clock(twin) if twin and self.twins else None,
            other[0] if other else "",
            self.clock(other[1]) if other else None,
        )

    def attention(self, b: Batch) -> Iterator[Line]:
        """Output, maps, and the scatter of K and V, of one layer."""
        moved = 2 * b.key_bytes + 2 * b.query.nbytes
        gathered = [read_kv(b.cache, b.layout, r) for r in range(b.requests)]
        key, value = (torch.stack([kv[i] for kv in gathered]) for i in range(2))
        q = b.query.view(b.requests, b.rows, *b.query.shape[1:]).transpose(1, 2)
        group = b.family.heads != b.family.kv_heads
        yield self.line(
            "attention output",
            b,
            lambda: attention_kernels.attend(b.query, b.cache, b.layout, b.scale, b.output, b.lse),
            moved,
            2 * b.half_flops,
            lambda: paged_attention.paged_attention(b.query, b.cache, b.layout, b.scale, b.output, [None] * b.requests),
            ("SDPA, keys gathered before", lambda: scaled_dot_product_attention(q, key, value, enable_gqa=group)),
        )
        maps = b.maps(True)
        yield self.line(
            "attention map",
            b,
            lambda: attention_kernels.attention_maps(b.query, b.cache, b.layout, b.scale, b.lse, maps),
            b.key_bytes + b.query.nbytes + maps.memory.nbytes,
            b.half_flops,
        )
        yield self.line(
            "output and map",
            b,
            lambda: attention_kernels.paged_attention(b.query, b.cache, b.layout, b.scale, b.output, maps),
            moved + b.key_bytes + b.query.nbytes + maps.memory.nbytes,
            3 * b.half_flops,
            lambda: paged_attention.paged_attention(b.query, b.cache, b.layout, b.scale, b.output, maps),
        )
        key, value = b.fresh
        slots = b.layout.slots
        yield self.line(
            "write K and V",
            b,
            lambda: page_kernels.write_kv(b.cache, key, value, slots),
            2 * b.fresh.nbytes,
            twin=lambda: paged_attention.write_kv(b.cache, key, value, slots),
        )
        angle = torch.rand(b.length, b.family.head_size // 2, device=b.query.device)
        turns = torch.cat([angle.cos(), angle.sin()], 1)
        arguments = (b.cache, b.query, key, value, b.positions, turns, slots, b.output, torch.empty_like(key))
        yield self.line(
            "RoPE, K and V into pages",
            b,
            lambda: rotary_kernels.rotate_and_write(*arguments),
            2 * b.query.nbytes + 5 * key.nbytes,
            twin=lambda: rotary.rotate_and_write(*arguments),
        )

    def xformers(self, b: Batch) -> Iterator[Line]:
        """The same through xformers' paged attention, without maps and with them."""
        f = b.family
        shape = AttentionShape(f.heads, f.kv_heads, f.head_size, BLOCK_SIZE, b.dtype)
        reasons = xformers_attention.prepare(self.clock.device, shape)
        if reasons:
            self.left_out.append(f"xformers for {f.name}: {'; '.join(reasons)}")
            return
        for name, maps in (("xformers output", b.maps(False, False)), ("xformers output and map", b.maps(True))):
            moved = 2 * b.key_bytes + 2 * b.query.nbytes
            again = b.key_bytes + b.query.nbytes + maps.memory.nbytes if maps.plan.elements else 0

            def call(maps: AttentionMaps = maps) -> None:
                xformers_attention.paged_attention(b.query, b.cache, b.layout, b.scale, b.output, maps)

            yield self.line(name, b, call, moved + again, (3 if again else 2) * b.half_flops)

    def rollout(self, b: Batch, kept: bool) -> Line:
        """The chain through all layers: from kept maps, or from queries (a request's first step)."""
        attention_kernels.attend(b.query, b.cache, b.layout, b.scale, None, b.lse)
        maps = b.maps(kept)
        layers = [LayerRecord(maps, None if kept else b.query, b.cache, b.scale)] * b.family.layers
        wanted = [True] * b.requests
        each = maps.memory.nbytes if kept else b.key_bytes + b.query.nbytes
        arguments = (b.positions, layers, b.layout, wanted, b.length, None)
        return self.line(
            "rollout, maps kept" if kept else "rollout, maps again",
            b,
            lambda: rollout_kernels.batched_rollout(*arguments),
            each * b.family.layers,
            0 if kept else b.half_flops * b.family.layers,
            lambda: rollout.batched_rollout(*arguments),
        )

    def statistics(self, family: Family, rows: int, settings: str) -> Line:
        """Of [rows, vocabulary] logits: greedy, sampled, or behind a nucleus filter."""
        device = self.clock.device
        logits = 4 * torch.randn(rows, family.vocab, device=device)
        logits = logits.bfloat16() if device.type == "cuda" else logits
        params = RowParams(
            torch.full((rows,), float(settings == "sampled"), device=device),
            torch.full((rows,), 0.9 if settings == "top_p" else 1.0, device=device),
            torch.zeros(rows, dtype=torch.int64, device=device),
            torch.rand(rows, dtype=torch.float64, device=device),
            settings == "sampled",
            settings == "top_p",
        )
        place = Batch(family, 1, 1, 1, device)
        line = self.line(
            f"row statistics, {settings}",
            place,
            lambda: row_stats_kernels.tile_stats(logits, params, 0, False, False),
            logits.nbytes,
            twin=lambda: row_stats.tile_stats(logits.clone(), params, 0, False, False),
        )
        line.rows, line.length = rows, family.vocab
        return line

    def density(self, family: Family, requests: int) -> Line:
        """Certainty density of whole canvases."""
        device = self.clock.device
        known = torch.rand(requests, CANVAS, device=device) < 0.3
        length = torch.full((requests,), CANVAS, device=device)
        sigma = torch.full((requests,), 10.0, device=device)
        line = self.line(
            "certainty density",
            Batch(family, requests, 1, 1, device),
            lambda: density_kernels.certainty_density(known, length, sigma),
            known.nbytes + 4 * known.numel(),
            twin=lambda: density.certainty_density(known, length, sigma),
        )
        line.rows = line.length = CANVAS
        return line

    def run(self, families: tuple[Family, ...], lengths: list[int], batches: list[int]) -> Iterator[Line]:
        """Every kernel."""
        device = self.clock.device
        for family in families:
            for length in lengths:
                for requests in batches:
                    batch = Batch(family, requests, refreshed_rows(length), length, device)
                    yield from self.attention(batch)
                    if length == lengths[-1]:
                        yield from self.xformers(batch)
                    yield self.rollout(batch, kept=True)
                first = Batch(family, 1, length, length, device)
                yield self.rollout(first, kept=False)
            for rows in (2,) if self.clock.dry else (CURRENT_K, 256):
                for settings in ("greedy", "sampled", "top_p"):
                    yield self.statistics(family, rows, settings)
            yield self.density(family, 1 if self.clock.dry else 64)

    def _fits(self, call: Callable[[], Any]) -> float | None:
        """Milliseconds, or None where the tile needs more shared memory than the card has."""
        try:
            return self.clock(call)
        except triton.runtime.errors.OutOfResources:
            return None

    def tiles(self, family: Family, length: int) -> Iterator[tuple[str, int, int, float | None]]:
        """Times of other tile sizes than the kernels' own: (kernel, rows, keys, ms)."""
        for rows in (refreshed_rows(length), length):
            batch = Batch(family, 1, rows, length, self.clock.device)
            for m in (16, 32, 64, 128):
                for n in (32, 64, 128):

                    def attend(m: int = m, n: int = n, b: Batch = batch) -> None:
                        attention_kernels.attend(b.query, b.cache, b.layout, b.scale, b.output, b.lse, (m, n))

                    yield f"attention output, {rows} rows", m, n, self._fits(attend)
        batch = Batch(family, 1, refreshed_rows(length), length, self.clock.device)
        maps = batch.maps(True)
        for m in (16, 32, 64):
            for n in (32, 64, 128):

                def leave(m: int = m, n: int = n) -> None:
                    b = batch
                    attention_kernels.attention_maps(b.query, b.cache, b.layout, b.scale, b.lse, maps, (m, n))

                yield "attention map", m, n, self._fits(leave)
