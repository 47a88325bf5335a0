"""Bidirectional attention of scattered query rows over paged K and V, in PyTorch: the CPU path and the specification.

Three things a refresh needs: the output of the rows, the head-averaged probability map of the rows (for the
attention rollout), and the same map's product with a vector without ever holding the map (for steps in which so many
rows are refreshed that the map would be a T x T matrix).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple

import torch

from vllm_d2cache.ops.attention_maps import AttentionMaps as AttentionMaps
from vllm_d2cache.ops.attention_maps import MapGroup as MapGroup
from vllm_d2cache.ops.attention_maps import MapPlan as MapPlan
from vllm_d2cache.ops.dispatch import dispatched
from vllm_d2cache.ops.host import Numbers

_TRITON = "vllm_d2cache.ops.triton"

# Probabilities that exist at one time while a map is taken: [heads, tile rows, T]. Large enough that a matrix product
# has many rows, small enough to stay in the last-level cache.
_TILE_ELEMENTS = 1 << 21
# Rows that are attended from at a time where they end at different keys: each tile reads no key behind its last one.
_TILE_ROWS = 256


@dataclass(frozen=True)
class AttentionShape:
    """One rank's attention."""

    heads: int
    kv_heads: int
    head_size: int
    block_size: int  # positions of a KV block
    dtype: torch.dtype


@dataclass(frozen=True)
class PagedLayout:
    """Where each request's keys and values lie; the same for all layers. Built once a step."""

    counts: list[int]  # query rows of each request, in order
    lengths: list[int]  # T of each request
    block_table: torch.Tensor  # [R, blocks] int, KV block ids
    first_block: list[int]  # id of a request's first block if its blocks are consecutive, else -1
    slots: torch.Tensor  # [N] int64, flat KV slot of each query row; -1 for a padding row
    # Of each request: [n] int64 positions its rows attend to, None = all of them. The default is None for everyone.
    keys: list[torch.Tensor | None] | None = None
    # [N] int32, the span of each row: it attends to positions before this one; ascending within a request but for its
    # padding. None = all rows see their whole text.
    limits: torch.Tensor | None = None
    exact: bool = False  # no row is padding
    # What kernels read of the lists above; layouts of one step share it, whatever rows and keys their layers have.
    numbers: Numbers = field(default_factory=Numbers, repr=False, compare=False)

    def read_on_device(self, row_starts: torch.Tensor, text_lengths: torch.Tensor) -> None:
        """Have kernels read these two, which may change; ``counts`` and ``lengths`` are then no more than capacities.

        Args:
            row_starts: [R + 1] int32.
            text_lengths: [R] int32.
        """
        self.__dict__.update(row_starts=row_starts, text_lengths=text_lengths, capacities=True)

    @cached_property
    def capacities(self) -> bool:
        """Whether ``counts`` and ``lengths`` are capacities; else they are those of the batch."""
        return False

    @cached_property
    def limits_host(self) -> list[int]:
        """``limits`` on the host: for attention in PyTorch, once a step."""
        return [] if self.limits is None else self.limits.tolist()

    # For kernels, on the device; made once a step, when the first layer asks.

    @cached_property
    def row_starts(self) -> torch.Tensor:
        """[R + 1] int32: first row of each request, and the end of the last."""
        self.numbers.expect(self.lengths, torch.int32)
        return self.numbers.on(self.slots.device, starts_of(self.counts), torch.int32)

    @cached_property
    def text_lengths(self) -> torch.Tensor:
        """[R] int32: ``lengths``."""
        self.numbers.expect(starts_of(self.counts), torch.int32)
        return self.numbers.on(self.slots.device, self.lengths, torch.int32)

    def __post_init__(self) -> None:
        if self.keys is not None and any(k is not None for k in self.keys):
            starts, counts = self._key_places(self.keys)
            self.numbers.expect(starts, torch.int64)
            self.numbers.expect(counts, torch.int32)

    @cached_property
    def visible_keys(self) -> VisibleKeys | None:
        """``keys`` as kernels read them; None where every request attends to all of its positions."""
        if self.keys is None or all(k is None for k in self.keys):
            return None
        starts, counts = self._key_places(self.keys)
        device = self.slots.device
        return VisibleKeys(
            torch.cat([k for k in self.keys if k is not None]).int(),
            self.numbers.on(device, starts, torch.int64),
            self.numbers.on(device, counts, torch.int32),
        )

    def _key_places(self, keys: list[torch.Tensor | None]) -> tuple[list[int], list[int]]:
        offsets = iter(accumulate((k.shape[0] for k in keys if k is not None), initial=0))
        starts = [-1 if k is None else next(offsets) for k in keys]
        return starts, [t if k is None else k.shape[0] for k, t in zip(keys, self.lengths, strict=True)]

    def expect_rows(self, counts: list[int]) -> None:
        """Some layer will have these rows of each request."""
        self.numbers.expect(starts_of(counts), torch.int32)


def spans(positions: torch.Tensor, block_length: int | None) -> torch.Tensor | None:
    """[N] int32: before which position the keys of a row at each of ``positions`` end; None = behind the whole text."""
    return None if block_length is None else (positions + block_length - positions % block_length).int()


def starts_of(counts: list[int]) -> list[int]:
    """[R + 1]: where the rows of each begin, and the end of the last."""
    return list(accumulate(counts, initial=0))


class VisibleKeys(NamedTuple):
    """Positions that the rows of some requests attend to."""

    positions: torch.Tensor  # flat int32, request by request
    starts: torch.Tensor  # [R] int64, first of each request in ``positions``; -1 = all positions
    counts: torch.Tensor  # [R] int32, keys of each request


@dispatched(f"{_TRITON}.pages")
def write_kv(kv_cache: torch.Tensor, key: torch.Tensor, value: torch.Tensor, slots: torch.Tensor) -> None:
    """Scatter fresh keys and values into their pages, in place.

    Args:
        kv_cache: [blocks, kv heads, block size, 2 * head size], keys first.
        key, value: [N, kv heads, head size].
        slots: [N] int64, block * block size + offset; rows with -1 are not written.
    """
    head_size = key.shape[2]
    pages = kv_cache.permute(0, 2, 1, 3)  # [blocks, block size, kv heads, 2 * head size]
    if kv_cache.device.type == "cpu" and pages.stride(0) == pages.shape[1] * pages.stride(1):
        # Blocks follow one another: a slot is an index. Padding rows go to the null block, which no request owns.
        flat, slots = pages.flatten(0, 1), slots.clamp(min=0)
        flat[..., :head_size].index_copy_(0, slots, key)
        flat[..., head_size:].index_copy_(0, slots, value)
        return
    block_size = kv_cache.shape[2]
    block = slots.div(block_size, rounding_mode="floor")
    offset = slots - block * block_size
    offset = torch.where(slots < 0, 0, offset)
    block = block.clamp(min=0)
    pages[..., :head_size][block, offset] = key
    pages[..., head_size:][block, offset] = value


def read_kv(kv_cache: torch.Tensor, layout: PagedLayout, r: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values [kv heads, T, head size] of one request; views if its blocks are consecutive, else copies."""
    block_size, head_size = kv_cache.shape[2], kv_cache.shape[3] // 2
    length = layout.lengths[r]
    num_blocks = -(-length // block_size)
    start = layout.first_block[r]
    blocks = slice(start, start + num_blocks) if start >= 0 else layout.block_table[r, :num_blocks].long()
    pages = kv_cache[blocks]
    heads = pages.shape[1]
    text = pages.transpose(0, 1).reshape(heads, num_blocks * block_size, 2 * head_size)[:, :length]
    return text[..., :head_size], text[..., head_size:]


@dispatched(f"{_TRITON}.attention", xformers="vllm_d2cache.ops.xformers_attention")
def paged_attention(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    layout: PagedLayout,
    scale: float,
    output: torch.Tensor,
    maps: AttentionMaps | Sequence[torch.Tensor | None],
) -> None:
    """Attend from every query row to all T positions of its request, or to those the layout names or ends at.

    Args:
        query: [N, heads, head size].
        kv_cache: [blocks, kv heads, block size, 2 * head size].
        scale: of the logits.
        output: [N, heads, head size], written.
        maps: one for each request: float32 [rows, T], written with the mean probability over heads, or None. A request
            that attends to a part of its positions, or whose rows end at different keys, has none.
    """
    offset = 0
    for r, count in enumerate(layout.counts):
        rows = slice(offset, offset + count)
        offset += count
        if count == 0:
            continue
        key, value = read_kv(kv_cache, layout, r)
        visible = layout.keys[r] if layout.keys else None
        if visible is not None:
            assert maps[r] is None
            key, value = key[:, visible], value[:, visible]
        q = query[rows].transpose(0, 1)  # [heads, n, D]
        destination = output[rows].transpose(0, 1)
        target = maps[r]
        if layout.limits is not None:
            assert target is visible is None
            _attend_to_limits(q, key, value, scale, destination, layout.limits_host[rows])
        elif target is None:
            destination.copy_(_attend(q, key, value, scale))
        else:
            _attend_with_map(q, key, value, scale, destination, target)


def _attend(
    q: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """[heads, n, D] of rows that attend to all keys, or to those of ``mask`` [n, keys] bool."""
    gqa = q.shape[0] != key.shape[0]
    attended = torch.nn.functional.scaled_dot_product_attention(
        q.unsqueeze(0), key.unsqueeze(0), value.unsqueeze(0), attn_mask=mask, scale=scale, enable_gqa=gqa
    )
    return attended[0]


def _attend_to_limits(
    q: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, output: torch.Tensor, limits: list[int]
) -> None:
    """Output [heads, n, D] of rows each of which attends to the keys before its limit."""
    for i in range(0, len(limits), _TILE_ROWS):
        part = limits[i : i + _TILE_ROWS]
        end, mask = max(part), None
        if min(part) < end:
            bound = torch.tensor(part, device=q.device).unsqueeze(1)
            mask = torch.arange(end, device=q.device).unsqueeze(0) < bound
        j = i + len(part)
        # What lies behind the last limit may never have been written.
        output[:, i:j] = _attend(q[:, i:j], key[:, :end], value[:, :end], scale, mask)


def _attend_with_map(
    q: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, output: torch.Tensor, target: torch.Tensor
) -> None:
    """Output [heads, n, D] and mean map [n, T] of one request, in fp32."""
    heads, group = q.shape[0], q.shape[0] // key.shape[0]
    value = value.float()
    for i, j, h, probs in _probability_tiles(q, key, scale):
        if len(probs) == heads:
            torch.mean(probs, dim=0, out=target[i:j])
        else:
            for head, part in enumerate(probs, start=h):
                if head == 0:
                    torch.mul(part, 1 / heads, out=target[i:j])
                else:
                    target[i:j].add_(part, alpha=1 / heads)
        if len(probs) == 1:
            output[h, i:j].copy_(torch.mm(probs[0], value[h // group]))
        else:
            last = h + len(probs)
            shared = probs.view(-1, group * (j - i), probs.shape[2])
            attended = torch.bmm(shared, value[h // group : last // group])
            output[h:last, i:j].copy_(attended.view(len(probs), j - i, -1))


def attention_map_product(
    query: torch.Tensor, key: torch.Tensor, scale: float, weights: torch.Tensor, accumulator: torch.Tensor
) -> None:
    """Add weights^T times the head-averaged map to ``accumulator``, a tile of rows at a time.

    Args:
        query: [n, heads, head size].
        key: [kv heads, T, head size].
        weights: [n] float32.
        accumulator: [T] float32, changed in place.
    """
    if query.shape[0] == 0:
        return
    u = weights / query.shape[1]
    for i, j, _, probs in _probability_tiles(query.transpose(0, 1), key, scale):
        accumulator.addmv_(probs.flatten(0, 1).t(), u[i:j].repeat(len(probs)))


def _probability_tiles(
    q: torch.Tensor, key: torch.Tensor, scale: float
) -> Iterator[tuple[int, int, int, torch.Tensor]]:
    """Yield (i, j, h, probabilities of rows i to j under the heads from h on [k, j - i, T] in fp32).

    As many heads at a time as fit the tile, else one head and as many rows as fit: a matrix product wants many rows.
    The memory is reused: a tile is valid until the next one.
    """
    heads, count, head_size = q.shape
    kv_heads, length, _ = key.shape
    group = heads // kv_heads
    q = q.float() * scale
    key_t = key.float().transpose(1, 2)
    at_once = min(kv_heads, _TILE_ELEMENTS // (group * count * length)) * group
    rows = count if at_once else max(1, min(count, _TILE_ELEMENTS // length))
    step = at_once or 1
    scratch = _scratch(q.device, step * rows * length)
    for h in range(0, heads, step):
        k = min(step, heads - h)
        for i in range(0, count, rows):
            j = min(i + rows, count)
            probs = scratch[: k * (j - i) * length].view(k, j - i, length)
            if k == 1:
                torch.mm(q[h, i:j], key_t[h // group], out=probs[0])
            else:
                part = q[h : h + k].reshape(k // group, group * count, head_size)
                torch.bmm(part, key_t[h // group : (h + k) // group], out=probs.view(k // group, -1, length))
            yield i, j, h, torch.softmax(probs, dim=-1, out=probs)


_scratch_memory: dict[torch.device, torch.Tensor] = {}


def _scratch(device: torch.device, elements: int) -> torch.Tensor:
    """Flat fp32 memory for one tile, kept from call to call: fresh pages cost more than the arithmetic on them."""
    memory = _scratch_memory.get(device)
    if memory is None or memory.numel() < elements:
        with torch.inference_mode(False):  # an inference tensor could not be used outside that mode later
            memory = _scratch_memory[device] = torch.empty(elements, device=device)
    return memory
