"""The attention that positions receive, and how it is compared from step to step."""

from __future__ import annotations

import pytest
import torch

from tests.reference.elastic import DriftLoop
from vllm_d2cache.mechanisms.drift import Drift, DriftHook, Focus, WatchedRows
from vllm_d2cache.ops import attention_drift
from vllm_d2cache.ops.attention_drift import attention_to, received_attention, shared_similarity
from vllm_d2cache.ops.paged_attention import PagedLayout
from vllm_d2cache.ops.rollout import TensorParallel

HEADS, KV_HEADS, SIZE, SCALE = 4, 2, 8, 0.4
BLOCK = 4


def attention_map(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """[n, T] float64, head by head."""
    n, heads = query.shape[:2]
    group = heads // key.shape[0]
    total = torch.zeros(n, key.shape[1], dtype=torch.float64)
    for h in range(heads):
        total += (query[:, h].double() @ key[h // group].double().T * SCALE).softmax(1)
    return total / heads


@pytest.mark.parametrize("tile", [1, 100, 1 << 21])
@pytest.mark.parametrize("n", [1, 5, 17])
def test_against_the_whole_map(n: int, tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_drift, "_TILE_ELEMENTS", tile)
    generator = torch.Generator().manual_seed(n)
    query = 3 * torch.randn(n, HEADS, SIZE, generator=generator)
    key = 3 * torch.randn(KV_HEADS, 13, SIZE, generator=generator)
    want = attention_map(query, key)
    total, normaliser = received_attention(query, key, SCALE)
    torch.testing.assert_close(total.double(), want.sum(0), rtol=1e-5, atol=1e-6)
    for position in range(13):
        got = attention_to(query, key, SCALE, normaliser, torch.tensor(position))
        torch.testing.assert_close(got.double(), want[:, position], rtol=1e-5, atol=1e-6)


def test_without_rows_nothing_is_received() -> None:
    total, normaliser = received_attention(torch.zeros(0, HEADS, SIZE), torch.zeros(KV_HEADS, 3, SIZE), SCALE)
    assert total.tolist() == [0.0] * 3
    assert normaliser.shape == (0, HEADS)


def test_the_layer_that_changed_most_decides_among_shared_positions() -> None:
    new = torch.tensor([[1.0, 1.0, 9.0], [1.0, 0.0, 9.0]])
    old = torch.tensor([[2.0, 2.0, 0.0], [3.0, 4.0, 0.0]])
    shared = torch.tensor([True, True, False])
    assert float(shared_similarity(new, old, shared)) == pytest.approx(0.6)
    one = torch.tensor([True, False, False])
    assert float(shared_similarity(new, old, one)) == 0.0, "one number has no direction"
    assert float(shared_similarity(new, old, torch.zeros(3, dtype=torch.bool))) == 0.0


class Steps:
    """Two requests, of which the second is watched, with random queries and keys in each step and layer."""

    T, LOOKING = 11, ([5, 6, 7], [6, 7, 8], [10])

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.query = [[torch.randn(9, HEADS, SIZE, generator=generator) for _ in range(2)] for _ in range(3)]
        self.pages = [[torch.randn(6, KV_HEADS, BLOCK, 2 * SIZE, generator=generator) for _ in range(2)] for _ in "abc"]

    def positions(self, step: int) -> list[int]:
        return [0, 1, *self.LOOKING[step], 9][:6]

    def known(self, step: int) -> list[int]:
        return [t for t in range(self.T) if t not in self.LOOKING[step] and t < 9]

    def measured(self, memory: dict[int, Focus], kv_heads: slice, mate: bool) -> list[Drift]:
        """Every step, under some of the heads."""
        heads = slice(2 * kv_heads.start, 2 * kv_heads.stop)
        found = []
        for step in range(3):
            positions = self.positions(step)
            rows = [positions.index(p) for p in self.LOOKING[step]]
            known = torch.zeros(self.T, dtype=torch.bool)
            known[self.known(step)] = True
            watched = WatchedRows(torch.tensor(rows), torch.tensor(self.LOOKING[step]), known)
            # The mate has two rows and the first block; blocks of the watched one are in no order.
            table = torch.tensor([[0, 0, 0], [4, 1, 3]], dtype=torch.int32)
            own = PagedLayout([len(positions)], [self.T], table[1:], [-1], torch.arange(9))
            both = PagedLayout([2, len(positions)], [3, self.T], table, [-1, -1], torch.arange(9))
            layout = both if mate else own
            meter = DriftHook([None, watched] if mate else [watched], [5, 2] if mate else [2], memory, self.ranks)
            for layer in range(2):
                query = self.query[step][layer][:, heads]
                start = 0 if mate else 2
                pages = self.pages[step][layer][:, kv_heads]
                meter.before_attention(query[start : 2 + len(positions)], pages, SCALE, layout)
            found.append(meter.result(self.T + 2))
        return found

    ranks: TensorParallel | None = None

    def expected(self) -> list[tuple[float, list[int]]]:
        loop, want = DriftLoop(), []
        for step in range(3):
            maps = []
            for layer in range(2):
                pages = self.pages[step][layer][[4, 1, 3]].transpose(0, 1).reshape(KV_HEADS, -1, 2 * SIZE)
                rows = self.query[step][layer][2 : 2 + len(self.positions(step))]
                maps.append(attention_map(rows, pages[:, : self.T, :SIZE]))
            want.append(loop.step(maps, self.positions(step), self.LOOKING[step], self.known(step)))
        return want


@pytest.mark.parametrize("mate", [False, True])
def test_steps_against_the_loop(mate: bool) -> None:
    steps, last = Steps(1), int(mate)
    got, want = steps.measured({}, slice(0, 2), mate), steps.expected()
    assert [d[0] for d in want][::2] == [0.0, 0.0], "nothing before the first step, no row in common with the third"
    assert 0 < want[1][0] < 1
    for drift, (similarity, attended) in zip(got, want, strict=True):
        assert float(drift.similarity[last]) == pytest.approx(similarity, abs=1e-5)
        assert drift.attended[last].nonzero().flatten().tolist() == sorted(set(attended))
        if mate:
            assert float(drift.similarity[0]) == 0.0
            assert not drift.attended[0].any()


def test_a_request_gives_the_same_beside_a_mate() -> None:
    alone, beside = Steps(2).measured({}, slice(0, 2), False), Steps(2).measured({}, slice(0, 2), True)
    assert [float(d.similarity[0]) for d in alone] == [float(d.similarity[1]) for d in beside]


def test_ranks_with_different_heads_agree() -> None:
    """Each has half of the heads; what they reduce is replayed in order, from runs that record it."""
    steps, shares = Steps(3), []
    for heads in (slice(0, 1), slice(1, 2)):
        shares.append([])
        steps.ranks = TensorParallel(2, lambda x, own=shares[-1]: own.append(x) or 2 * x)
        steps.measured({}, heads, False)
    sums = [a + b for a, b in zip(*shares, strict=True)]
    # A first run of each rank has its own idea of what is attended to most; only the first sum is right yet. Repeat
    # until every number that a rank sends follows from sums of both.
    for _ in range(len(sums)):
        shares = []
        for heads in (slice(0, 1), slice(1, 2)):
            sent, answers = [], iter(sums)
            shares.append(sent)
            steps.ranks = TensorParallel(2, lambda x, own=sent, a=answers: own.append(x) or next(a))
            got = steps.measured({}, heads, False)
        sums = [a + b for a, b in zip(*shares, strict=True)]
    for drift, (similarity, attended) in zip(got, steps.expected(), strict=True):
        assert float(drift.similarity[0]) == pytest.approx(similarity, abs=1e-5)
        assert drift.attended[0].nonzero().flatten().tolist() == sorted(set(attended))
