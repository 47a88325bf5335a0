"""Scores and choice of keys against loops, and what layers attend to after it."""

from __future__ import annotations

import pytest
import torch

from tests.ops.test_paged_attention import HEAD, make_paged
from vllm_d2cache.mechanisms.hidden_keys import KeyChoice, KeysHook
from vllm_d2cache.ops.key_choice import choose_keys, mean_query_scores
from vllm_d2cache.ops.paged_attention import read_kv
from vllm_d2cache.ops.rollout import TensorParallel


@pytest.mark.parametrize("heads", [(8, 2), (4, 4)], ids=["gqa", "mha"])
def test_scores_by_loop(heads: tuple[int, int]) -> None:
    query, key = torch.randn(5, heads[0], HEAD), torch.randn(heads[1], 33, HEAD)
    group = heads[0] // heads[1]
    want = [
        sum(float(query[:, h].double().mean(0) @ key[h // group, j].double()) for h in range(heads[0])) / heads[0]
        for j in range(33)
    ]
    got = mean_query_scores(query, key)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), torch.tensor(want, dtype=torch.float64), rtol=1e-5, atol=1e-5)


SCORES = torch.tensor([0.0, 9.0, 1.0, 0.0, 0.0, -5.0, 2.0, 0.0])


@pytest.mark.parametrize(
    ("count", "pool", "want"),
    [
        (0, 3, []),
        (1, 1, [1]),
        (3, 1, [1, 2, 6]),
        (4, 1, [0, 1, 2, 6]),  # of the zeros the lowest
        (3, 3, [0, 1, 2]),  # the neighbours of the best count as much
        (4, 3, [0, 1, 2, 5]),  # the worst one stands beside a 2
        (2, 2, [0, 1]),  # reaches one place to the right
        (8, 3, list(range(8))),
        (99, 1, list(range(8))),
        (3, 1 << 40, [0, 1, 2]),
    ],
)
def test_choices_by_hand(count: int, pool: int, want: list[int]) -> None:
    assert choose_keys(SCORES, count, pool).tolist() == want


def test_negative_scores_are_not_beaten_by_the_border() -> None:
    assert choose_keys(torch.tensor([-9.0, -1.0, -9.0, -9.0, -9.0]), 2, 3).tolist() == [0, 1]


def choice(choose: bool, count: int = 4) -> KeyChoice:
    return KeyChoice(choose, torch.tensor([20, 21, 22]), torch.tensor([0, 1, 2]), count, 3)


def test_layers_choose_by_themselves_and_remember_by_slot() -> None:
    layers = [make_paged([3, 5], [63, 63]) for _ in range(3)]
    queries = [torch.randn(8, 8, HEAD) for _ in layers]
    kept: dict[int, list[torch.Tensor]] = {7: [torch.tensor([1])], 4: [torch.tensor([2])] * 3}
    first = KeysHook([None, None], [choice(True), choice(False)], [7, 4], kept)
    for query, paged in zip(queries, layers, strict=True):
        keys = first.before_attention(query, paged.cache, 1.0, paged.layout).keys
        assert keys is not None
        assert keys[0] is None, "the step that chooses attends to everything"
        assert keys[1].tolist() == [2, 20, 21, 22]
    assert len(kept[7]) == 3
    for query, paged, got in zip(queries, layers, kept[7], strict=True):
        scores = mean_query_scores(query[:3], read_kv(paged.cache, paged.layout, 0)[0])
        places = [j for j in range(63) if j not in (20, 21, 22)]
        assert got.tolist() == [places[n] for n in choose_keys(scores[places], 4, 3).tolist()]
    assert len({tuple(k.tolist()) for k in kept[7]}) > 1, "layers differ"

    second = KeysHook([None, torch.tensor([5])], [choice(False), None], [7, 3], kept)
    for i, (query, paged) in enumerate(zip(queries, layers, strict=True)):
        keys = second.before_attention(query, paged.cache, 1.0, paged.layout).keys
        assert keys is not None
        assert keys[0].tolist() == sorted([20, 21, 22, *kept[7][i].tolist()])
        assert keys[1].tolist() == [5], "others see what is the same in all layers"


def test_ranks_with_different_heads_choose_the_same() -> None:
    paged, query = make_paged([3], [63], kv_heads=4), torch.randn(3, 8, HEAD)
    whole: dict[int, list[torch.Tensor]] = {}
    KeysHook([None], [choice(True)], [0], whole).before_attention(query, paged.cache, 1.0, paged.layout)
    halves = [(query[:, :4], paged.cache[:, :2]), (query[:, 4:], paged.cache[:, 2:])]
    parts = [mean_query_scores(q, read_kv(c, paged.layout, 0)[0]) for q, c in halves]
    for q, c in halves:
        kept: dict[int, list[torch.Tensor]] = {}
        ranks = TensorParallel(2, lambda x: parts[0] + parts[1])
        KeysHook([None], [choice(True)], [0], kept, ranks).before_attention(q, c, 1.0, paged.layout)
        assert kept[0][0].tolist() == whole[0][0].tolist()
