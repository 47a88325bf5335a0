"""Paged attention, its maps and their products against a dense loop."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch

from vllm_d2cache.ops.paged_attention import PagedLayout, attention_map_product, paged_attention, read_kv, write_kv

HEAD = 16
LENGTHS = [1, 63, 129]


@dataclass
class Paged:
    """Requests in poisoned pages, and the same keys and values in dense tensors."""

    cache: torch.Tensor
    layout: PagedLayout
    keys: list[torch.Tensor]  # of each request [T, kv heads, D]
    values: list[torch.Tensor]


def empty_cache(blocks: int, kv_heads: int, block_size: int, dtype: torch.dtype, heads_first: bool) -> torch.Tensor:
    """[blocks, kv heads, block size, 2 D] of NaN, in one of the two memory orders the backend offers."""
    if heads_first:
        cache = torch.full((kv_heads, blocks, block_size, 2 * HEAD), torch.nan, dtype=dtype)
        return cache.transpose(0, 1)
    return torch.full((blocks, kv_heads, block_size, 2 * HEAD), torch.nan, dtype=dtype)


def block_table(lengths: list[int], block_size: int, consecutive: bool) -> tuple[torch.Tensor, list[int], int]:
    """Table [R, blocks] (unused entries point nowhere), first blocks, blocks in all. Block 0 stays unused."""
    need = [-(-t // block_size) for t in lengths]
    total = 1 + sum(need)
    ids = torch.arange(1, total) if consecutive else torch.randperm(total - 1) + 1
    table = torch.full((len(lengths), max(need)), 1 << 30, dtype=torch.int32)
    first, offset = [], 0
    for r, n in enumerate(need):
        table[r, :n] = ids[offset : offset + n]
        first.append(int(ids[offset]) if consecutive else -1)
        offset += n
    return table, first, total


def slots_of(table: torch.Tensor, r: int, positions: torch.Tensor, block_size: int) -> torch.Tensor:
    return table[r, positions // block_size].long() * block_size + positions % block_size


def make_paged(
    counts: list[int],
    lengths: list[int],
    kv_heads: int = 2,
    block_size: int = 16,
    dtype: torch.dtype = torch.float32,
    consecutive: bool = False,
    heads_first: bool = True,
) -> Paged:
    """Every position of every request is written through write_kv, in random order."""
    table, first, blocks = block_table(lengths, block_size, consecutive)
    cache = empty_cache(blocks, kv_heads, block_size, dtype, heads_first)
    keys = [torch.randn(t, kv_heads, HEAD).to(dtype) for t in lengths]
    values = [torch.randn(t, kv_heads, HEAD).to(dtype) for t in lengths]
    for r, t in enumerate(lengths):
        order = torch.randperm(t)
        write_kv(cache, keys[r][order], values[r][order], slots_of(table, r, order, block_size))
    slots = torch.zeros(sum(counts), dtype=torch.int64)  # rows that are not padding
    layout = PagedLayout(counts, lengths, table, first, slots)
    return Paged(cache, layout, keys, values)


def dense_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> tuple[torch.Tensor, ...]:
    """Output [n, heads, D] and map [n, T], one query head at a time in float64."""
    heads, kv_heads = q.shape[1], k.shape[1]
    outputs, maps = [], []
    for h in range(heads):
        kv = h // (heads // kv_heads)
        probs = torch.softmax(q[:, h].double() @ k[:, kv].double().T * scale, -1)
        outputs.append(probs @ v[:, kv].double())
        maps.append(probs)
    return torch.stack(outputs, 1), torch.stack(maps).mean(0)


def tolerance(dtype: torch.dtype) -> dict[str, float]:
    return {"rtol": 2e-5, "atol": 2e-6} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.03}


@pytest.mark.parametrize("heads", [(8, 2), (4, 4)], ids=["gqa", "mha"])
@pytest.mark.parametrize("consecutive", [True, False], ids=["consecutive", "scattered"])
def test_rows_attend_to_the_keys_that_are_named(consecutive: bool, heads: tuple[int, int]) -> None:
    counts, lengths = [5, 63, 20, 7], [63, 63, 129, 129]
    paged = make_paged(counts, lengths, heads[1], consecutive=consecutive)
    named = [torch.arange(63), None, torch.randperm(129)[:40].sort().values, torch.tensor([128])]
    layout = replace(paged.layout, keys=named)
    # What is not named may hold anything.
    hidden = torch.ones(129, dtype=torch.bool)
    hidden[named[2]] = False
    where = slots_of(layout.block_table, 2, hidden.nonzero().flatten(), 16)
    poison = torch.full((len(where), heads[1], HEAD), torch.nan)
    write_kv(paged.cache, poison, poison, where)
    query = torch.randn(sum(counts), heads[0], HEAD)
    output = torch.full_like(query, torch.nan)
    paged_attention(query, paged.cache, layout, 0.3, output, [None] * 4)
    offset = 0
    for r, n in enumerate(counts):
        keys = slice(None) if named[r] is None else named[r]
        want, _ = dense_attention(query[offset : offset + n], paged.keys[r][keys], paged.values[r][keys], 0.3)
        torch.testing.assert_close(output[offset : offset + n].double(), want, **tolerance(torch.float32))
        offset += n


@pytest.mark.parametrize("heads", [(8, 2), (4, 4)], ids=["gqa", "mha"])
@pytest.mark.parametrize("consecutive", [True, False], ids=["consecutive", "scattered"])
def test_rows_attend_to_the_keys_before_their_limit(consecutive: bool, heads: tuple[int, int]) -> None:
    """One limit for all rows of a request, several, one a row; more rows than a tile has."""
    limits = [[40] * 5, [8] * 3 + [16] * 3 + [129], [*range(1, 8)], [200] * 100 + [300] * 200 + [301]]
    paged = make_paged([len(own) for own in limits], [63, 129, 7, 333], heads[1], consecutive=consecutive)
    for r, own in enumerate(limits):
        # What lies behind the last limit may never have been written.
        where = slots_of(paged.layout.block_table, r, torch.arange(own[-1], paged.layout.lengths[r]), 16)
        poison = torch.full((len(where), heads[1], HEAD), torch.nan)
        write_kv(paged.cache, poison, poison, where)
    flat = [limit for own in limits for limit in own]
    layout = replace(paged.layout, limits=torch.tensor(flat, dtype=torch.int32))
    query = torch.randn(len(flat), heads[0], HEAD)
    output = torch.full_like(query, torch.nan)
    paged_attention(query, paged.cache, layout, 0.3, output, [None] * 4)
    request = [r for r, own in enumerate(limits) for _ in own]
    for n, (r, limit) in enumerate(zip(request, flat, strict=True)):
        want, _ = dense_attention(query[n : n + 1], paged.keys[r][:limit], paged.values[r][:limit], 0.3)
        torch.testing.assert_close(output[n : n + 1].double(), want, **tolerance(torch.float32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("heads", [(8, 2), (4, 4)], ids=["gqa", "mha"])
@pytest.mark.parametrize("consecutive", [True, False], ids=["consecutive", "scattered"])
@pytest.mark.parametrize("block_size", [16, 128])
def test_outputs_and_maps_match_the_dense_loop(
    block_size: int, consecutive: bool, heads: tuple[int, int], dtype: torch.dtype
) -> None:
    counts, lengths = [1, 5, 63, 0, 20, 129], [1, 63, 63, 16, 129, 129]
    paged = make_paged(counts, lengths, heads[1], block_size, dtype, consecutive)
    query = torch.randn(sum(counts), heads[0], HEAD).to(dtype)
    output = torch.full_like(query, torch.nan)
    # Alternate requests with and without a map.
    shapes = enumerate(zip(counts, lengths, strict=True))
    maps = [torch.full(shape, torch.nan) if r % 2 else None for r, shape in shapes]
    paged_attention(query, paged.cache, paged.layout, 0.3, output, maps)
    offset = 0
    for r, n in enumerate(counts):
        want, want_map = dense_attention(query[offset : offset + n], paged.keys[r], paged.values[r], 0.3)
        torch.testing.assert_close(output[offset : offset + n].double(), want, **tolerance(dtype))
        stored = maps[r]
        if stored is not None:
            torch.testing.assert_close(stored.double(), want_map, **tolerance(dtype))
            torch.testing.assert_close(stored.sum(1), torch.ones(n))
        offset += n


@pytest.mark.parametrize("heads_first", [True, False])
@pytest.mark.parametrize("consecutive", [True, False])
@pytest.mark.parametrize("length", [*LENGTHS, 16, 32])
def test_read_kv_returns_what_write_kv_wrote(length: int, consecutive: bool, heads_first: bool) -> None:
    paged = make_paged([0, 0], [17, length], consecutive=consecutive, heads_first=heads_first)
    key, value = read_kv(paged.cache, paged.layout, 1)
    assert torch.equal(key, paged.keys[1].transpose(0, 1))
    assert torch.equal(value, paged.values[1].transpose(0, 1))
    is_view = key.untyped_storage().data_ptr() == paged.cache.untyped_storage().data_ptr()
    assert is_view or not (consecutive and heads_first), "consecutive blocks should not be copied"


@pytest.mark.parametrize("heads_first", [True, False])
def test_write_kv_touches_its_rows_alone(heads_first: bool) -> None:
    paged = make_paged([2], [35], heads_first=heads_first)
    before = paged.cache.clone()
    positions = torch.tensor([15, 16, 34])  # both sides of a page boundary, and the last position
    slots = slots_of(paged.layout.block_table, 0, positions, 16)
    key, value = torch.randn(3, 2, HEAD), torch.randn(3, 2, HEAD)
    write_kv(paged.cache, key, value, slots)
    block, offset = slots // 16, slots % 16
    assert torch.equal(paged.cache[block, :, offset], torch.cat([key, value], -1))
    changed = ~((paged.cache == before) | (paged.cache.isnan() & before.isnan())).flatten(2).all(-1)
    assert set(changed.nonzero()[:, 0].tolist()) == set(block.tolist())
    paged.cache[block, :, offset] = before[block, :, offset]
    assert torch.equal(paged.cache.nan_to_num(7.5), before.nan_to_num(7.5))


def test_writing_no_row_changes_nothing() -> None:
    paged = make_paged([0], [20])
    before = paged.cache.clone()
    none = torch.empty(0, 2, HEAD)
    write_kv(paged.cache, none, none, torch.empty(0, dtype=torch.int64))
    assert torch.equal(paged.cache.nan_to_num(7.5), before.nan_to_num(7.5))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="padding rows occur on GPUs alone")
def test_padding_rows_write_to_the_null_block_alone() -> None:
    paged = make_paged([3], [35])
    cache, before = paged.cache.cuda(), paged.cache.clone()
    key = torch.randn(3, 2, HEAD)
    slots = torch.tensor([int(slots_of(paged.layout.block_table, 0, torch.tensor([3]), 16)), -1, -1])
    write_kv(cache, key.cuda(), key.cuda(), slots.cuda())
    after = cache.cpu()
    block, offset = int(slots[0]) // 16, int(slots[0]) % 16
    assert torch.equal(after[block, :, offset], torch.cat([key[0], key[0]], -1))
    after[block, :, offset] = before[block, :, offset]
    assert torch.equal(after[1:].nan_to_num(7.5), before[1:].nan_to_num(7.5))


@pytest.mark.parametrize("heads", [(8, 2), (4, 4)], ids=["gqa", "mha"])
@pytest.mark.parametrize("tile", [1, 1000, 5000, 7000, 10_000])  # part of a head, 2 and 3 of 4 heads, a group
def test_tiles_smaller_than_the_rows(monkeypatch: pytest.MonkeyPatch, tile: int, heads: tuple[int, int]) -> None:
    monkeypatch.setattr("vllm_d2cache.ops.paged_attention._TILE_ELEMENTS", tile)
    paged = make_paged([37], [63], heads[1])
    query = torch.randn(37, heads[0], HEAD)
    output, attention = torch.full_like(query, torch.nan), torch.full((37, 63), torch.nan)
    paged_attention(query, paged.cache, paged.layout, 0.3, output, [attention])
    want, want_map = dense_attention(query, paged.keys[0], paged.values[0], 0.3)
    torch.testing.assert_close(output.double(), want, **tolerance(torch.float32))
    torch.testing.assert_close(attention.double(), want_map, **tolerance(torch.float32))


@pytest.mark.parametrize("heads", [(8, 2), (4, 4)], ids=["gqa", "mha"])
@pytest.mark.parametrize("tile", [1, 3000, 10_000, 1 << 20])
@pytest.mark.parametrize("length", LENGTHS)
def test_map_product_matches_the_map(
    monkeypatch: pytest.MonkeyPatch, length: int, tile: int, heads: tuple[int, int]
) -> None:
    monkeypatch.setattr("vllm_d2cache.ops.paged_attention._TILE_ELEMENTS", tile)
    count = max(1, length // 2)
    key = torch.randn(length, heads[1], HEAD)
    query, weights = torch.randn(count, heads[0], HEAD), torch.rand(count)
    start = torch.rand(length)
    got = start.clone()
    attention_map_product(query, key.transpose(0, 1), 0.3, weights, got)
    _, want_map = dense_attention(query, key, key, 0.3)
    want = start.double() + weights.double() @ want_map
    torch.testing.assert_close(got.double(), want, **tolerance(torch.float32))


def test_map_product_of_no_row_adds_nothing() -> None:
    accumulator = torch.ones(20)
    attention_map_product(torch.empty(0, 4, HEAD), torch.randn(2, 20, HEAD), 0.3, torch.empty(0), accumulator)
    assert (accumulator == 1).all()


def test_scale_is_applied_once_in_every_path() -> None:
    paged = make_paged([20], [63])
    query = torch.randn(20, 8, HEAD)
    plain, mapped = torch.full_like(query, torch.nan), torch.full_like(query, torch.nan)
    attention = torch.full((20, 63), torch.nan)
    paged_attention(query, paged.cache, paged.layout, 0.9, plain, [None])
    paged_attention(query, paged.cache, paged.layout, 0.9, mapped, [attention])
    torch.testing.assert_close(plain, mapped)
    product = torch.zeros(63)
    attention_map_product(query, read_kv(paged.cache, paged.layout, 0)[0], 0.9, torch.ones(20), product)
    torch.testing.assert_close(product, attention.sum(0))


def test_a_request_does_not_depend_on_its_mates() -> None:
    counts, lengths = [7, 20, 63], [63, 129, 63]
    paged = make_paged(counts, lengths)
    query = torch.randn(sum(counts), 8, HEAD)
    output = torch.full_like(query, torch.nan)
    maps: list[torch.Tensor | None] = [torch.full((7, 63), torch.nan), None, torch.full((63, 63), torch.nan)]
    paged_attention(query, paged.cache, paged.layout, 0.3, output, maps)
    offset = 0
    for r, (n, t) in enumerate(zip(counts, lengths, strict=True)):
        single = PagedLayout([n], [t], paged.layout.block_table[r : r + 1], [-1], paged.layout.slots)
        out = torch.full((n, 8, HEAD), torch.nan)
        one_map = None if maps[r] is None else torch.full((n, t), torch.nan)
        paged_attention(query[offset : offset + n], paged.cache, single, 0.3, out, [one_map])
        assert torch.equal(out, output[offset : offset + n])
        if one_map is not None:
            assert torch.equal(one_map, maps[r])
        offset += n
