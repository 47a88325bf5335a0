"""The batched rollout against its PyTorch twin: kept maps, maps computed again, and both in one batch."""

from __future__ import annotations

import pytest
import torch

from tests.triton.paged import Batch, Shape, make_batch
from vllm_d2cache.ops import rollout as twin
from vllm_d2cache.ops.paged_attention import AttentionMaps, paged_attention
from vllm_d2cache.ops.rollout import LayerRecord, TensorParallel
from vllm_d2cache.ops.triton import attention, rollout

LAYERS = 2
SHAPES = [Shape(4, 4, 64), Shape(7, 1, 32), Shape(4, 2, 32, 16, torch.bfloat16)]
REAL = [
    pytest.param(Shape(32, 32, 128, 16, torch.bfloat16), marks=pytest.mark.gpu, id="llada-8b"),
    pytest.param(Shape(28, 4, 128, 16, torch.bfloat16), marks=pytest.mark.gpu, id="dream-7b"),
]


def records(batch: Batch, kept: list[bool], layers: int = LAYERS) -> tuple[list[LayerRecord], list[LayerRecord]]:
    """What the layers leave behind under the kernels, and under the twins (which meet no padding rows)."""
    by_kernel, by_twin = [], []
    for layer in range(layers):
        query = torch.randn(batch.query.shape, device=batch.query.device).to(batch.query.dtype)
        query = torch.where(batch.live[:, None, None], query, torch.nan)
        scale = 0.2 + 0.1 * layer
        maps = batch.maps(kept, keep_lse=True)
        attention.paged_attention(query, batch.cache, batch.layout, scale, torch.empty_like(query), maps)
        by_kernel.append(LayerRecord(maps, query, batch.cache, scale))
        real = query[batch.live]
        want: AttentionMaps = batch.maps(kept, batch.dense)
        paged_attention(real, batch.cache, batch.dense, scale, torch.empty_like(real), want)
        by_twin.append(LayerRecord(want, real, batch.cache, scale))
    return by_kernel, by_twin


def check(batch: Batch, kept: list[bool], wanted: list[bool], parallel: TensorParallel | None = None) -> None:
    layers, want_layers = records(batch, [k and w for k, w in zip(kept, wanted, strict=True)])
    width = max(batch.layout.lengths) + 3
    positions = torch.stack([batch.positions, torch.zeros_like(batch.positions)], 1)[:, 0]  # not contiguous
    got = rollout.batched_rollout(positions, layers, batch.layout, wanted, width, parallel)
    positions = batch.positions[batch.live]
    want = twin.batched_rollout(positions, want_layers, batch.dense, wanted, width, parallel)
    # Sums over rows and heads in another order, through the layers.
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    if parallel is None:
        totals = torch.tensor(batch.layout.lengths, device=got.device) * torch.tensor(wanted, device=got.device)
        torch.testing.assert_close(got.sum(1), totals.float(), rtol=1e-4, atol=1e-4)


COUNTS, LENGTHS = [1, 5, 0, 33], [1, 32, 20, 33]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_maps_and_replays_in_one_batch(shape: Shape, device: torch.device) -> None:
    check(make_batch(COUNTS, LENGTHS, shape, device), [True, True, False, False], [True] * 4)


@pytest.mark.parametrize("kept", [True, False])
def test_maps_alone_and_replays_alone(kept: bool, device: torch.device) -> None:
    check(make_batch(COUNTS, LENGTHS, SHAPES[0], device), [kept] * 4, [True] * 4)


def test_padding_rows_have_no_say(device: torch.device) -> None:
    batch = make_batch([7, 40, 9], [32, 41, 17], SHAPES[1], device, padding=[2, 11, 9])
    check(batch, [True, False, True], [True] * 3)


def test_requests_that_want_none_get_zeros(device: torch.device) -> None:
    batch = make_batch([7, 40, 9], [32, 41, 17], SHAPES[1], device)
    check(batch, [True, False, True], [False, True, True])


@pytest.mark.parametrize("kept", [True, False])
def test_ranks_reduce_the_product(kept: bool, device: torch.device) -> None:
    """Two ranks with the same heads have the mean of one."""
    batch = make_batch([7, 40], [32, 41], SHAPES[1], device)
    check(batch, [kept, kept], [True, True], TensorParallel(2, lambda product: 2 * product))


def test_no_row_at_all(device: torch.device) -> None:
    check(make_batch([0, 0], [5, 16], SHAPES[0], device), [True, False], [True, True])


def test_a_request_does_not_depend_on_its_mates(device: torch.device) -> None:
    """Bit for bit."""
    batch = make_batch([9, 21, 3], [50, 21, 33], SHAPES[0], device)
    kept = [True, False, True]
    layers, _ = records(batch, kept)
    together = rollout.batched_rollout(batch.positions, layers, batch.layout, [True] * 3, 60, None)
    offset = 0
    for r, (n, t) in enumerate(zip(batch.layout.counts, batch.layout.lengths, strict=True)):
        rows = slice(offset, offset + n)
        offset += n
        table, slots = batch.layout.block_table[r : r + 1], batch.layout.slots[rows]
        layout = type(batch.layout)([n], [t], table, [-1], slots)
        alone = Batch(batch.query[rows], batch.cache, layout, layout, batch.positions[rows], batch.live[rows])
        own = []
        for layer in layers:
            assert layer.queries is not None
            query, maps = layer.queries[rows], alone.maps([kept[r]], keep_lse=True)
            attention.paged_attention(query, batch.cache, layout, layer.scale, torch.empty_like(query), maps)
            own.append(LayerRecord(maps, query, batch.cache, layer.scale))
        single = rollout.batched_rollout(alone.positions, own, layout, [True], t, None)
        assert torch.equal(single[0], together[r, :t])


@pytest.mark.parametrize("shape", REAL)
def test_real_shapes(shape: Shape, device: torch.device) -> None:
    batch = make_batch([96, 1152, 430], [1024, 1152, 4096], shape, device, padding=[3, 0, 31])
    check(batch, [True, False, True], [True] * 3)
