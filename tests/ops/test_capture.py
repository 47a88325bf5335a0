"""The importance capture: stored maps and replayed queries agree, and no T x T tensor is ever made."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.ops.shapes import Shapes
from tests.ops.test_paged_attention import HEAD, Paged, dense_attention, make_paged
from tests.reference.rollout import rollout_dense
from vllm_d2cache.mechanisms import importance as module
from vllm_d2cache.mechanisms.importance import ImportanceCapture, MapPool
from vllm_d2cache.ops.paged_attention import PagedLayout, paged_attention

LAYERS = 4
SCALE = 0.3


class Forward:
    """The attention layers of one forward pass over ragged requests."""

    def __init__(self, counts: list[int], lengths: list[int], heads: int = 8, **layout: Any) -> None:
        self.counts, self.lengths = counts, lengths
        self.layers: list[Paged] = [make_paged(counts, lengths, **layout) for _ in range(LAYERS)]
        self.queries = [torch.randn(sum(counts), heads, HEAD) for _ in range(LAYERS)]
        self.rows = [torch.randperm(t)[:n].sort().values for n, t in zip(counts, lengths, strict=True)]

    def run(self, wanted: list[bool], pool: MapPool | None = None) -> ImportanceCapture:
        positions = torch.cat(self.rows)
        # A model has one layout for all layers; each layer of this test has its own block table.
        capture = ImportanceCapture(self.layers[0].layout, wanted, positions, pool or MapPool())
        for query, paged in zip(self.queries, self.layers, strict=True):
            capture.layout = paged.layout
            maps = capture.start_layer(query, paged.cache, SCALE)
            paged_attention(query, paged.cache, paged.layout, SCALE, torch.full_like(query, torch.nan), maps)
        return capture

    def want(self, r: int) -> torch.Tensor:
        """Importance by the dense definition."""
        start = sum(self.counts[:r])
        rows = slice(start, start + self.counts[r])
        maps = [
            dense_attention(q[rows], p.keys[r], p.values[r], SCALE)[1]
            for q, p in zip(self.queries, self.layers, strict=True)
        ]
        return rollout_dense(maps, self.rows[r])


def one_table(forward: Forward) -> Forward:
    """Give all layers the first layer's block table, as in a model, and rewrite their pages accordingly."""
    first = forward.layers[0].layout
    for paged in forward.layers[1:]:
        cache = torch.full_like(paged.cache, torch.nan)
        for r, blocks in enumerate(first.block_table):
            for j in range(-(-forward.lengths[r] // 16)):
                cache[int(blocks[j])] = paged.cache[int(paged.layout.block_table[r, j])]
        paged.cache, paged.layout = cache, first
    return forward


COUNTS, LENGTHS = [1, 63, 10, 129, 33], [1, 63, 63, 129, 129]


def test_importance_matches_the_dense_definition() -> None:
    forward = one_table(Forward(COUNTS, LENGTHS))
    got = forward.run([True] * 5).importance(140)
    assert got is not None
    assert got.shape == (5, 140)
    for r, t in enumerate(LENGTHS):
        torch.testing.assert_close(got[r, :t].double(), forward.want(r), rtol=1e-4, atol=1e-5)
        assert (got[r, t:] == 0).all()


@pytest.mark.parametrize("layout", [{}, {"kv_heads": 8}, {"consecutive": True}])
def test_stored_maps_and_replayed_queries_agree(monkeypatch: pytest.MonkeyPatch, layout: dict[str, Any]) -> None:
    forward = one_table(Forward([5, 20], [63, 129], **layout))
    by_path = []
    for share in (0, 1 << 30):  # every map kept, none kept
        monkeypatch.setattr(module, "_MAP_SHARE", share)
        monkeypatch.setattr(module, "_SMALL_MAP", 0)
        capture = forward.run([True, True])
        assert all((m is not None) == (share == 0) for m in capture.layers[0].maps)
        by_path.append(capture.importance(129))
    torch.testing.assert_close(by_path[0], by_path[1], rtol=1e-5, atol=1e-6)


def kept_maps(forward: Forward, members: list[int], fill: float) -> ImportanceCapture:
    """Layers whose attention is over, of some requests alone; what no map writes is ``fill``."""
    counts, lengths = [forward.counts[r] for r in members], [forward.lengths[r] for r in members]
    starts = [sum(forward.counts[:r]) for r in members]
    slots = torch.zeros(sum(counts), dtype=torch.int64)
    layout = PagedLayout(counts, lengths, torch.zeros(len(members), 1), [-1] * len(members), slots)
    positions = torch.cat([forward.rows[r] for r in members])
    capture = ImportanceCapture(layout, [True] * len(members), positions, MapPool())
    for query, paged in zip(forward.queries, forward.layers, strict=True):
        maps = capture.start_layer(query, paged.cache, SCALE)
        maps.memory.fill_(fill)
        for line, (r, start) in enumerate(zip(members, starts, strict=True)):
            seen = dense_attention(query[start : start + counts[line]], paged.keys[r], paged.values[r], SCALE)[1]
            maps[line].copy_(seen)
    return capture


@pytest.mark.parametrize("most", [None, 700], ids=["all grouped", "some alone"])
def test_mates_change_no_bit(monkeypatch: pytest.MonkeyPatch, most: int | None) -> None:
    """Whatever lies between the rows of mates, and however wide these are."""
    if most is not None:
        monkeypatch.setattr(module, "_MOST_GROUPED", most)
    forward = Forward([1, 20, 10, 30, 7, 9], [1, 63, 63, 60, 64, 129])
    members = [4, 0, 5, 2, 3, 1]
    together = kept_maps(forward, members, torch.nan)
    assert {g.pitch for g in together.plan.groups} == {1, 64} if most else {1, 64, 256}
    got = together.importance(130)
    assert got is not None
    for line, r in enumerate(members):
        own = kept_maps(forward, [r], 7.0).importance(forward.lengths[r])
        assert own is not None
        assert torch.equal(got[line, : forward.lengths[r]], own[0])
        assert (got[line, forward.lengths[r] :] == 0).all()
        torch.testing.assert_close(own[0].double(), forward.want(r), rtol=1e-4, atol=1e-5)


def test_the_number_of_operators_does_not_grow_with_the_requests() -> None:
    class Operators(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.count += 1
            return func(*args, **(kwargs or {}))

    counts = []
    for requests in (2, 9) * 2:  # what is made once for each number of rows is there at the second time
        capture = kept_maps(Forward([5] * requests, list(range(40, 40 + requests))), list(range(requests)), 0.0)
        with Operators() as operators:
            capture.importance(60)
        counts.append(operators.count)
    assert counts[2] == counts[3] < 60


def test_only_wanted_requests_cost_anything() -> None:
    forward = one_table(Forward([5, 20, 63], [63, 129, 63]))
    pool = MapPool()
    capture = forward.run([False, True, False], pool)
    got = capture.importance(129)
    assert got is not None
    assert (got[[0, 2]] == 0).all()
    assert [m is not None for m in capture.layers[0].maps] == [False, True, False]
    assert capture.layers[0].queries is None
    assert forward.run([False] * 3).importance(129) is None


def test_pool_memory_is_reused_and_its_old_contents_do_not_matter() -> None:
    pool = MapPool()
    big = one_table(Forward([30], [129]))
    first = big.run([True], pool)
    used = first.layers[0].maps[0]
    assert used is not None
    small = one_table(Forward([5, 9], [63, 63]))
    second = small.run([True, True], pool)
    again = second.layers[0].maps[0]
    assert again is not None
    assert again.untyped_storage().data_ptr() == used.untyped_storage().data_ptr()
    got = second.importance(63)
    assert got is not None
    for r in range(2):
        torch.testing.assert_close(got[r].double(), small.want(r), rtol=1e-4, atol=1e-5)


def test_replay_takes_the_queries_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    """A runner may reuse the query buffer in the next layer."""
    monkeypatch.setattr(module, "_SMALL_MAP", 0)
    forward = one_table(Forward([63], [63]))
    shared = torch.full_like(forward.queries[0], torch.nan)
    capture = ImportanceCapture(forward.layers[0].layout, [True], forward.rows[0], MapPool())
    for query, paged in zip(forward.queries, forward.layers, strict=True):
        shared.copy_(query)
        capture.start_layer(shared, paged.cache, SCALE)
    got = capture.importance(63)
    assert got is not None
    torch.testing.assert_close(got[0].double(), forward.want(0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("count", [300, 150, 75])
def test_no_square_of_the_text_length(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr("vllm_d2cache.ops.paged_attention._TILE_ELEMENTS", 8 * 300 * 20)
    total = 300
    forward = one_table(Forward([count], [total]))
    with Shapes() as shapes:
        forward.run([True]).importance(total)
    assert shapes.seen
    assert shapes.squares(total) == {}
    # A kept map is at most a quarter of the square; a replayed one is made 20 rows at a time.
    assert max(math.prod(shape) for shape in shapes.seen if total in shape) <= 8 * 20 * total


def test_a_request_without_rows_keeps_one_each() -> None:
    """Nothing refreshed means the identity: every position keeps its own unit."""
    layout = PagedLayout([0], [20], torch.zeros(1, 2, dtype=torch.int32), [0], torch.empty(0, dtype=torch.int64))
    capture = ImportanceCapture(layout, [True], torch.empty(0, dtype=torch.int64), MapPool())
    got = capture.importance(24)
    assert got is not None
    assert got.tolist() == [[1.0] * 20 + [0.0] * 4]
