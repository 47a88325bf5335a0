"""Attention, maps and page writes against their PyTorch twins."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.triton.conftest import INTERPRETED
from tests.triton.paged import Batch, Shape, make_batch, tolerance
from vllm_d2cache.ops import paged_attention as twin
from vllm_d2cache.ops.paged_attention import AttentionMaps, MapPlan
from vllm_d2cache.ops.rollout import LayerRecord
from vllm_d2cache.ops.triton import attention as kernels
from vllm_d2cache.ops.triton import pages, rollout

SCALED_DOWN = [
    Shape(4, 4, 64, 16),  # LLaDA: multi-head
    Shape(7, 1, 64, 16),  # Dream: 7 query heads of a kv head
    Shape(4, 2, 96, 32),
    Shape(2, 2, 128, 16),
    Shape(6, 3, 64, 48),  # pages that are no power of two
    Shape(4, 2, 64, 128, torch.bfloat16),
    Shape(4, 4, 64, 16, torch.float16),
]
REAL = [
    pytest.param(Shape(*heads, 128, block, dtype), marks=pytest.mark.gpu, id=f"{name}-page{block}-{dtype}")
    for name, heads in (("llada-8b", (32, 32)), ("dream-7b", (28, 4)))
    for block in (16, 64)
    for dtype in (torch.bfloat16, torch.float16, torch.float32)
]


def check(batch: Batch, kept: list[bool], shape: Shape) -> None:
    """Outputs and maps are the twin's; padding rows get zeros; nothing of what is NaN is read."""
    output, maps = torch.full_like(batch.query, torch.nan), batch.maps(kept)
    kernels.paged_attention(batch.query, batch.cache, batch.layout, 0.3, output, maps)
    query = batch.query[batch.live]
    want, want_maps = torch.full_like(query, torch.nan), batch.maps(kept, batch.dense)
    twin.paged_attention(query, batch.cache, batch.dense, 0.3, want, want_maps)
    torch.testing.assert_close(output[batch.live], want, **tolerance(shape.dtype))
    assert (output[~batch.live] == 0).all()
    for r, count in enumerate(batch.dense.counts):
        got, expected = maps[r], want_maps[r]
        assert (got is not None) == (expected is not None) == kept[r]
        if got is not None and expected is not None:
            # Maps are fp32 in every dtype: their logits are exact products of what is stored.
            torch.testing.assert_close(got[:count], expected, rtol=1e-4, atol=1e-6)
            assert (got[count:] == 0).all()


@pytest.mark.parametrize("shape", SCALED_DOWN, ids=str)
def test_ragged_requests_of_odd_sizes(shape: Shape, device: torch.device) -> None:
    # One row, none, all rows; one token, texts that end on a page boundary, just before and just after.
    block = shape.block_size
    batch = make_batch([1, 5, 0, 15, 33], [1, 2 * block, block + 1, block - 1, 65], shape, device)
    check(batch, [True, False, True, True, False], shape)


def test_blocks_outside_heads(device: torch.device) -> None:
    """The other memory order that the backend accepts."""
    check(make_batch([5, 9], [20, 33], SCALED_DOWN[2], device, heads_first=False), [True, False], SCALED_DOWN[2])


@pytest.mark.parametrize("shape", SCALED_DOWN[:2], ids=str)
def test_padding_rows(shape: Shape, device: torch.device) -> None:
    # A tile that is padding in part, one that is nothing else, and a request of padding alone.
    batch = make_batch([7, 70, 9], [32, 33, 17], shape, device, padding=[2, 37, 9])
    check(batch, [True, True, True], shape)


def test_no_row_at_all(device: torch.device) -> None:
    check(make_batch([0, 0], [5, 16], SCALED_DOWN[0], device), [True, False], SCALED_DOWN[0])


def test_rows_of_a_wider_tensor(device: torch.device) -> None:
    """Queries, keys and values are slices of the projection's output in the models."""
    shape = SCALED_DOWN[2]
    batch = make_batch([5, 9], [20, 33], shape, device)
    wide = torch.full((14, 3 * shape.heads, shape.head_size), torch.nan, device=device)
    wide[:, : shape.heads] = batch.query
    batch.query = wide[:, : shape.heads]
    output, maps = torch.full((14, shape.heads, shape.head_size), torch.nan, device=device), batch.maps([True, True])
    kernels.paged_attention(batch.query, batch.cache, batch.layout, 0.3, output, maps)
    want, want_maps = torch.empty_like(output), batch.maps([True, True])
    twin.paged_attention(batch.query, batch.cache, batch.layout, 0.3, want, want_maps)
    torch.testing.assert_close(output, want, **tolerance(shape.dtype))
    torch.testing.assert_close(maps.memory, want_maps.memory, rtol=1e-4, atol=1e-6)


def test_a_request_does_not_depend_on_its_mates(device: torch.device) -> None:
    """Bit for bit."""
    shape = SCALED_DOWN[1]
    batch = make_batch([7, 20, 10], [33, 40, 40], shape, device)
    output, maps = torch.full_like(batch.query, torch.nan), batch.maps([True] * 3)
    kernels.paged_attention(batch.query, batch.cache, batch.layout, 0.3, output, maps)
    offset = 0
    for r, (n, t) in enumerate(zip(batch.layout.counts, batch.layout.lengths, strict=True)):
        rows = slice(offset, offset + n)
        table, slots = batch.layout.block_table[r : r + 1], batch.layout.slots[rows]
        alone = Batch(
            batch.query[rows],
            batch.cache,
            twin.PagedLayout([n], [t], table, [-1], slots),
            twin.PagedLayout([n], [t], table, [-1], slots),
            batch.positions[rows],
            batch.live[rows],
        )
        single, own = torch.full_like(alone.query, torch.nan), alone.maps([True])
        kernels.paged_attention(alone.query, batch.cache, alone.layout, 0.3, single, own)
        assert torch.equal(single, output[rows])
        assert torch.equal(own[0], maps[r])
        offset += n


@pytest.mark.parametrize("shape", SCALED_DOWN[:2], ids=str)
def test_requests_that_attend_to_a_part(shape: Shape, device: torch.device) -> None:
    """To every other position, to the last one, to all."""
    batch = make_batch([4, 9, 3], [75, 20, 33], shape, device)
    keys = [torch.arange(0, 75, 2, device=device), torch.tensor([19], device=device), None]
    batch.layout = batch.dense = replace(batch.layout, keys=keys)
    check(batch, [False, False, True], shape)


@pytest.mark.parametrize("span", [4, 16, 32])
@pytest.mark.parametrize("shape", SCALED_DOWN[:2] + SCALED_DOWN[4:6], ids=str)
def test_rows_that_end_at_different_keys(shape: Shape, span: int, device: torch.device) -> None:
    """At the end of their own block of positions; what no row sees may never have been written."""
    batch = make_batch([9, 40, 3, 2], [75, 60, 33, 1], shape, device, padding=[2, 0, 3, 1])
    limits = torch.where(batch.live, (batch.positions // span + 1) * span, 0)
    offset = 0
    for r, (n, t) in enumerate(zip(batch.layout.counts, batch.layout.lengths, strict=True)):
        limits[offset : offset + n].clamp_(max=t)
        hidden = torch.arange(int(limits[offset : offset + n].max()), t, device=device)
        page = batch.layout.block_table[r, hidden // shape.block_size].long()
        batch.cache[page, :, hidden % shape.block_size] = torch.nan
        offset += n
    batch.layout = replace(batch.layout, limits=limits.int())
    batch.dense = replace(batch.dense, limits=limits[batch.live].int())
    check(batch, [False] * 4, shape)


def test_large_logits_do_not_overflow(device: torch.device) -> None:
    shape = SCALED_DOWN[0]
    batch = make_batch([6, 3], [40, 20], shape, device)
    batch.query *= 100
    check(batch, [True, True], shape)


def test_log_sum_exp_alone_is_that_of_the_output(device: torch.device) -> None:
    shape = SCALED_DOWN[1]
    batch = make_batch([6, 30], [40, 70], shape, device, padding=[1, 0])
    first, second = (torch.full(batch.query.shape[:2], torch.nan, device=device) for _ in range(2))
    kernels.attend(batch.query, batch.cache, batch.layout, 0.3, torch.empty_like(batch.query), first)
    kernels.attend(batch.query, batch.cache, batch.layout, 0.3, None, second)
    assert torch.equal(first[batch.live], second[batch.live])
    assert first[batch.live].isfinite().all()


@pytest.mark.parametrize("heads_first", [True, False])
@pytest.mark.parametrize("shape", SCALED_DOWN[2:], ids=str)
def test_writes_go_to_their_rows_alone(shape: Shape, heads_first: bool, device: torch.device) -> None:
    batch = make_batch([3, 0, 4], [35, 5, 17], shape, device, padding=[1, 0, 2], heads_first=heads_first)
    fresh = torch.randn(7, 3 * shape.kv_heads, shape.head_size, device=device).to(shape.dtype)
    key, value = fresh[:, : shape.kv_heads], fresh[:, shape.kv_heads : 2 * shape.kv_heads]
    want, slots = batch.cache.clone(), batch.layout.slots
    twin.write_kv(want, key[batch.live], value[batch.live], slots[batch.live])
    pages.write_kv(batch.cache, key, value, slots)
    assert torch.equal(batch.cache.nan_to_num(7.5), want.nan_to_num(7.5))


def test_writing_no_row_changes_nothing(device: torch.device) -> None:
    batch = make_batch([0], [20], SCALED_DOWN[0], device)
    before, none = batch.cache.clone(), torch.empty(0, 4, 64, device=device)
    pages.write_kv(batch.cache, none, none, batch.layout.slots)
    assert torch.equal(batch.cache.nan_to_num(7.5), before.nan_to_num(7.5))


@pytest.mark.parametrize("shape", REAL)
def test_real_shapes(shape: Shape, device: torch.device) -> None:
    batch = make_batch([96, 1152, 130], [1024, 1152, 4096], shape, device, padding=[3, 0, 31])
    check(batch, [True, False, True], shape)


def test_heads_that_lie_more_than_32_bits_behind_the_first() -> None:
    """A card's KV cache with heads outside blocks: head times stride does not fit 32 bits, the stride alone does."""
    if not INTERPRETED:
        pytest.skip("the interpreter follows the same arithmetic without a card's whole memory")
    shape, stride = Shape(3, 3, 64, 16, torch.float16), (1 << 30) + 4096
    near = make_batch([5], [33], shape, torch.device("cpu"))
    blocks = near.cache.shape[0]
    # Address space, not memory: pages that nobody touches do not exist.
    flat = torch.empty(3 * stride, dtype=torch.float16)
    far = flat.as_strided((blocks, 3, 16, 128), (16 * 128, stride, 128, 1))
    row, key, value = near.layout.slots, *torch.randn(2, 5, 3, 64).half()
    far.copy_(near.cache)
    for cache in (near.cache, far):
        pages.write_kv(cache, key, value, row)
    output, maps = torch.empty(2, *near.query.shape).half(), [near.maps([True], keep_lse=True) for _ in range(2)]
    for cache, out, left in zip((near.cache, far), output, maps, strict=True):
        kernels.paged_attention(near.query, cache, near.layout, 0.3, out, left)
    importance = []
    for cache, left in zip((near.cache, far), maps, strict=True):
        again = AttentionMaps(MapPlan.pack([None]), torch.empty(0), left.lse)
        layer = LayerRecord(again, near.query, cache, 0.3)
        importance.append(rollout.batched_rollout(near.positions, [layer], near.layout, [True], 33, None))
    assert torch.equal(*output)
    assert torch.equal(maps[0].memory, maps[1].memory)
    assert torch.equal(*importance)
