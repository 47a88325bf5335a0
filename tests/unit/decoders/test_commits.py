"""How many candidates are committed, and which (docs/methods/d2cache.md, section 4)."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.views import columns
from vllm_d2cache.decoders.scores import ranking_score
from vllm_d2cache.ops.ranking import choose_commits
from vllm_d2cache.ops.row_stats import RowStats
from vllm_d2cache.options.request import SCORES


def commit(score: list[float], candidates: list[int] | None = None, **options: float) -> list[int]:
    """Slots committed for one request; all slots are candidates unless listed."""
    width = len(score)
    mask = torch.zeros(1, width, dtype=torch.bool)
    mask[0, list(range(width)) if candidates is None else candidates] = True
    made = columns(1, **options)
    chosen = choose_commits(torch.tensor([score]), mask, made.tokens_per_step, made.threshold, made.factor)
    return chosen[0].nonzero().flatten().tolist()


def test_fixed_count_takes_the_best() -> None:
    score = [0.1, 0.9, 0.3, 0.8, 0.5]
    assert commit(score) == [1]
    assert commit(score, tokens_per_step=3) == [1, 3, 4]


def test_candidates_alone_are_committed() -> None:
    assert commit([0.9, 0.8, 0.1, 0.2], [2, 3]) == [3]
    assert commit([0.9, 0.8, 0.1, 0.2], [2, 3], tokens_per_step=4) == [2, 3]
    assert commit([0.9, math.nan, 0.1], [0, 2], tokens_per_step=2) == [0, 2]


def test_counts_larger_than_the_candidates_take_all() -> None:
    assert commit([0.4, 0.2, 0.3], tokens_per_step=100) == [0, 1, 2]


@pytest.mark.parametrize("rule", [{}, {"threshold": 0.5}, {"factor": 1.0}, {"tokens_per_step": 3}])
def test_no_candidates_no_commits(rule: dict[str, float]) -> None:
    assert commit([0.9, 0.8], [], **rule) == []


def test_ties_go_to_the_lower_slot() -> None:
    assert commit([0.5] * 6) == [0]
    assert commit([0.2, 0.5, 0.5, 0.5], tokens_per_step=2) == [1, 2]
    assert commit([0.0] * 40, list(range(7, 40)), tokens_per_step=3) == [7, 8, 9]


def test_threshold_takes_every_score_that_reaches_it() -> None:
    assert commit([0.9, 0.5, 0.49, 0.75], threshold=0.5) == [0, 1, 3]
    assert commit([1.0, 0.999, 1.0], threshold=1.0) == [0, 2]
    assert commit([0.9, 0.9, 0.9], [1], threshold=0.5) == [1]


def test_threshold_with_fewer_than_the_minimum_takes_the_best() -> None:
    assert commit([0.1, 0.3, 0.2], threshold=0.5) == [1]
    assert commit([0.1, 0.6, 0.2], threshold=0.5, tokens_per_step=2) == [1, 2]
    assert commit([0.1, 0.6, 0.7], threshold=0.5, tokens_per_step=1) == [1, 2]


def factor_by_loop(scores: list[float], factor: float, least: int) -> int:
    """Section 4: smallest n with (n + 1)(1 - score_n) >= f, less one; without such n the count of all, less one."""
    ordered = sorted(scores, reverse=True)
    total = len(ordered)
    stop = next((n for n in range(1, total + 1) if (n + 1) * (1 - ordered[n - 1]) >= factor), total)
    return min(max(stop - 1, least), total)


def test_factor_by_hand() -> None:
    # 2 * 0.05 = 0.1, 3 * 0.1 = 0.3, 4 * 0.2 = 0.8: the third is the first to reach 0.5, so two are committed.
    assert commit([0.8, 0.95, 0.3, 0.9], factor=0.5) == [1, 3]


def test_factor_is_one_short_of_all_when_nothing_stops_it() -> None:
    """The published code's off-by-one."""
    assert commit([0.99, 0.98, 0.97], factor=100.0) == [0, 1]
    assert commit([0.99], factor=100.0) == [0]  # the minimum of one


@given(
    st.lists(st.sampled_from([i / 32 for i in range(33)]), min_size=1, max_size=9),
    st.sampled_from([0.25, 0.5, 1.0, 2.0, 8.0]),
    st.integers(1, 4),
)
def test_factor_matches_the_loop(scores: list[float], factor: float, least: int) -> None:
    count = factor_by_loop(scores, factor, least)
    best = sorted(range(len(scores)), key=lambda g: (-scores[g], g))[:count]
    assert commit(scores, factor=factor, tokens_per_step=least) == sorted(best)


@given(st.data())
def test_rows_with_different_rules_do_not_mix(data: st.DataObject) -> None:
    n, width = 4, 7
    score = torch.rand(n, width)
    candidates = torch.rand(n, width) < 0.6
    rules = data.draw(st.lists(st.sampled_from([(0.0, 0.0), (0.5, 0.0), (0.0, 1.0)]), min_size=n, max_size=n))
    counts = data.draw(st.lists(st.integers(1, 9), min_size=n, max_size=n))
    options = columns(
        n, threshold=[t for t, _ in rules], factor=[f for _, f in rules], tokens_per_step=[float(c) for c in counts]
    )
    got = choose_commits(score, candidates, options.tokens_per_step, options.threshold, options.factor)
    for r in range(n):
        one = columns(1, threshold=rules[r][0], factor=rules[r][1], tokens_per_step=counts[r])
        want = choose_commits(score[r : r + 1], candidates[r : r + 1], one.tokens_per_step, one.threshold, one.factor)
        assert torch.equal(got[r : r + 1], want)
        assert not (got[r] & ~candidates[r]).any()
        assert bool(got[r].any()) == bool(candidates[r].any())


def test_each_row_is_ranked_by_its_own_statistic() -> None:
    stats = RowStats(
        torch.zeros(3, dtype=torch.int64),
        torch.tensor([0.5, 0.6, 0.7]),
        torch.tensor([0.1, 0.2, 0.3]),
        torch.tensor([0.0, 1.0, 2.0]),
    )
    index = torch.tensor([SCORES.index(name) for name in ("confidence", "margin", "entropy")])
    got = ranking_score(stats, index, torch.arange(3))
    torch.testing.assert_close(got, torch.tensor([0.5, 0.2, math.exp(-2.0)]))


def test_lower_entropy_ranks_higher_and_stays_positive() -> None:
    entropy = torch.tensor([0.0, 0.5, 11.0])
    stats = RowStats(torch.zeros(3, dtype=torch.int64), torch.ones(3), None, entropy)
    got = ranking_score(stats, torch.tensor([SCORES.index("entropy")]), torch.zeros(3, dtype=torch.int64))
    assert (got[:-1] > got[1:]).all()
    assert (got > 0).all()
    assert (got <= 1).all()
