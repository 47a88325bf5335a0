"""Attention rollout as a backward vector chain: importance of every position without a T x T matrix.

docs/methods/d2cache.md, sections 3.4 and 12. With W_l the row-normalised (attention + identity) matrix of layer l, the
importance c_j = sum_i (W_L ... W_1)_ij is the row vector of ones pushed through the layers from the last to the first;
a position that was not refreshed has the identity row and keeps its share.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain

import numpy as np
import torch

from vllm_d2cache.ops.columns import first_columns, line_numbers
from vllm_d2cache.ops.dispatch import dispatched
from vllm_d2cache.ops.host import upload
from vllm_d2cache.ops.paged_attention import (
    AttentionMaps,
    MapGroup,
    PagedLayout,
    attention_map_product,
    read_kv,
    starts_of,
)

_SUM = 0  # of torch.embedding_bag's modes

# Receives u [n] and adds sum_i u_i * Abar[i, :] to v [T] in place; one for each layer, last layer first.
PushBack = Callable[[torch.Tensor, torch.Tensor], None]


@dataclass(frozen=True)
class TensorParallel:
    """How ranks that hold different heads agree."""

    size: int
    all_reduce: Callable[[torch.Tensor], torch.Tensor]  # sum over the ranks


@dataclass(frozen=True)
class LayerRecord:
    """What one layer of a forward pass leaves behind."""

    maps: AttentionMaps
    queries: torch.Tensor | None  # [N, heads, head size], where some request's map must be computed again
    kv_cache: torch.Tensor
    scale: float
    layout: PagedLayout | None = None  # of the layer's own rows, where they are not the step's


@dispatched("vllm_d2cache.ops.triton.rollout")
def batched_rollout(
    positions: torch.Tensor,
    layers: list[LayerRecord],
    layout: PagedLayout,
    wanted: list[bool],
    num_positions: int,
    tensor_parallel: TensorParallel | None,
    request: torch.Tensor | None = None,
) -> torch.Tensor:
    """Importance of every position of the requests that want it.

    Args:
        positions: [N] int64, refreshed position behind each row.
        layers: first to last.
        wanted: for each request; one without a kept map must have its rows in the layers' ``queries``.
        num_positions: width of the result.
        tensor_parallel: None on a single rank.
        request: [N] int64, whose each row is, where that is known on the device; kernels do not ask.

    Returns:
        [R, num_positions] float32; 0 in rows of other requests and past a request's own positions.
    """
    groups = layers[0].maps.plan.groups if layers else []
    if len(groups) == 1 and groups[0].requests == list(range(len(wanted))) and groups[0].pitch >= num_positions:
        return _rollout_of_group(positions, request, layers, layout, groups[0], tensor_parallel)[:, :num_positions]
    out = torch.zeros(len(wanted), num_positions, device=positions.device)
    for group in groups:
        lines = _rollout_of_group(positions, None, layers, layout, group, tensor_parallel)[:, :num_positions]
        out[group.requests, : lines.shape[1]] = lines
    grouped = {r for group in groups for r in group.requests}
    offset = 0
    for r, count in enumerate(layout.counts):
        rows = slice(offset, offset + count)
        offset += count
        if wanted[r] and r not in grouped:
            steps = (_layer_product(layer, layout, r, rows, tensor_parallel) for layer in reversed(layers))
            length = layout.lengths[r]
            # Padding rows stand for a position behind the text, which has no share of anything.
            refreshed = torch.where(layout.slots[rows] >= 0, positions[rows], length)
            out[r, :length] = rollout(steps, refreshed, length)
    return out


def _rollout_of_group(
    positions: torch.Tensor,
    owners: torch.Tensor | None,
    layers: list[LayerRecord],
    layout: PagedLayout,
    group: MapGroup,
    tensor_parallel: TensorParallel | None,
) -> torch.Tensor:
    """[requests, pitch] float32: importance of the requests of a group, 0 behind a text; one product a layer for all.

    An embedding bag is this product: a bag a request, whose rows of the map are weighted and added in their order. So a
    sum is the same beside any mates, and a column past a text's end is added to no other.
    """
    device, pitch = positions.device, group.pitch
    counts = [layout.counts[r] for r in group.requests]
    # Padding rows stand for a column more than any text has, which has no share of anything.
    width = pitch if layout.exact else pitch + 1
    lengths = tuple(layout.lengths[r] for r in group.requests)
    own, all_shares = _shares(lengths, pitch, width, len(layers), device)
    slots, each = layout.slots, line_numbers(sum(counts), device)
    if each.shape[0] < positions.shape[0]:
        begin = starts_of(layout.counts)
        rows = [range(begin[r], begin[r] + layout.counts[r]) for r in group.requests]
        row = upload(list(chain.from_iterable(rows)), torch.int64, device)
        positions, slots, owners = positions[row], slots[row], None
    if owners is None:
        owners = upload(np.arange(len(counts)).repeat(counts), torch.int64, device)
    bags = _bags(tuple(starts_of(counts)[:-1]), device)
    column = positions if layout.exact else torch.where(slots >= 0, positions, pitch)
    at = torch.add(column, owners, alpha=width)
    lines = all_shares.clone()
    text = first_columns(lines, pitch)
    # Rows of a map sum to one, so normalising it with the identity halves both. Here everything else is doubled in
    # their place, from shares that begin as much smaller: powers of two, so that no bit differs.
    kept = torch.full_like(lines, 2.0)
    kept.view(-1).index_fill_(0, at, 1.0)
    kept = first_columns(kept, pitch)
    for layer in reversed(layers):
        maps, weights = layer.maps.of_group(group), lines.take(at)
        product = torch.embedding_bag(maps, each, bags, False, _SUM, False, weights)[0]
        if tensor_parallel is not None:
            product = tensor_parallel.all_reduce(product) / tensor_parallel.size
        torch.addcmul(product, text, kept, out=text)
    return torch.where(own, text, 0.0)


@lru_cache(maxsize=8)
def _bags(starts: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """[R] int64: the first row of each bag. Shared: it is never written."""
    return upload(starts, torch.int64, device)


@lru_cache(maxsize=8)
def _shares(
    lengths: tuple[int, ...], pitch: int, width: int, doublings: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which columns are positions of texts [R, pitch] bool; the shares [R, width] float32 that these begin with.

    They are one after so many ``doublings``. Both are shared, and never written.
    """
    inside = torch.arange(width, device=device) < torch.tensor(lengths, device=device).unsqueeze(1)
    return inside[:, :pitch], inside.float() * 0.5**doublings


def _layer_product(
    layer: LayerRecord, layout: PagedLayout, r: int, rows: slice, tensor_parallel: TensorParallel | None
) -> PushBack:
    own_heads = _own_heads(layer, layout, r, rows)
    if tensor_parallel is None:
        return own_heads
    size, all_reduce = tensor_parallel.size, tensor_parallel.all_reduce

    def push_back(u: torch.Tensor, v: torch.Tensor) -> None:
        # The mean over all heads is the mean of the ranks' means; u is the same on every rank, so reducing the
        # product [T] does for reducing the map [q, T].
        product = torch.zeros_like(v)
        own_heads(u, product)
        v += all_reduce(product) / size

    return push_back


def _own_heads(layer: LayerRecord, layout: PagedLayout, r: int, rows: slice) -> PushBack:
    """The layer under the heads of this rank."""
    stored = layer.maps[r]
    if stored is not None:
        return push_back_map(stored)
    assert layer.queries is not None
    query = layer.queries[rows]
    key, _ = read_kv(layer.kv_cache, layout, r)

    def push_back(u: torch.Tensor, v: torch.Tensor) -> None:
        attention_map_product(query, key, layer.scale, u, v)

    return push_back


def rollout(layers: Iterable[PushBack], rows: torch.Tensor, num_positions: int) -> torch.Tensor:
    """Importance of each position of one request.

    Args:
        layers: from the last layer to the first, the product of a weight vector with that layer's head-averaged
            attention map Abar [n, T], whose rows sum to one.
        rows: [n] int64, the refreshed position behind each row of the map; T for a padding row.
        num_positions: T.

    Returns:
        [T] float32; sums to T.
    """
    everywhere = torch.ones(num_positions + 1, dtype=torch.float32, device=rows.device)
    everywhere[num_positions] = 0.0
    v = everywhere[:num_positions]
    for push_back in layers:
        # Rows of Abar sum to one, so normalising Abar + I halves both.
        u = everywhere[rows] * 0.5
        everywhere[rows] = u
        push_back(u, v)
    return v


def push_back_map(attention_map: torch.Tensor) -> PushBack:
    """A layer given by its stored map Abar [n, T] float32."""

    def push_back(u: torch.Tensor, v: torch.Tensor) -> None:
        v.addmv_(attention_map.t(), u)

    return push_back
