"""dkv against the counts traced from the authors' code, and by hand. docs/methods/other-caches.md, section 1."""

from __future__ import annotations

import pytest

from tests.unit.replay import one_by_one, replay
from vllm_d2cache.options.server import ServerOptions
from vllm_d2cache.policies import POLICY_CLASSES
from vllm_d2cache.requests.resolve import resolve

P, G = 3, 8
ALL = list(range(P + G))


def refreshed(options: dict, moves: list[dict[int, int]], shift: int = 0) -> list[list[int]]:
    return [s.refreshed for s in replay({"policy": "dkv", "window": 4, **options}, P, G, moves, shift)]


@pytest.mark.parametrize(("every", "share"), [(1, 1.00), (4, 0.57), (8, 0.50), (1000, 0.46)])
def test_mean_rows_of_the_traced_runs(every: int, share: float) -> None:
    """P = 11, G = 32, blocks of 16, one token a step; which ones does not matter for the count."""
    moves = one_by_one(*[16 * b + (7 * i) % 16 for b in range(2) for i in range(16)])
    options = {"policy": "dkv", "cache_steps": every, "window": 16}
    steps = replay(options, 11, 32, moves)
    mean = sum(len(s.refreshed) for s in steps) / len(steps)
    assert mean / 43 == pytest.approx(share, abs=0.005)


def test_decode_leaves_out_what_was_known_before_the_last_step() -> None:
    moves = one_by_one(1, 0, 3, 2, 7, 4, 6, 5)
    assert refreshed({"cache_steps": 100}, moves) == [
        ALL,
        ALL,
        [3, 5, 6, 7, 8, 9, 10],  # slot 0 was just committed, slot 1 the step before
        [5, 6, 7, 8, 9, 10],
        ALL,  # the next window
        ALL,
        [7, 8, 9],
        [8, 9],
    ]


def test_decode_refreshes_everything_every_so_many_steps_of_a_window() -> None:
    moves = [*one_by_one(1, 0, 3), {2: 7}, *one_by_one(7, 4, 6, 5)]
    full = [step == ALL for step in refreshed({"cache_steps": 3}, moves)]
    assert full == [True, True, False, True, True, True, False, True]
    assert all(step == ALL for step in refreshed({"cache_steps": 1}, moves))


def test_decode_in_a_shifted_family_keeps_the_neighbours_that_masks_are_read_from() -> None:
    moves = one_by_one(1, 0, 3, 2)
    got = refreshed({"cache_steps": 100}, moves, shift=1)
    assert got[2] == [3, 4, 5, 6, 7, 8, 9, 10]  # slot 2 is read from slot 1, so that stays although it is known
    assert got[3] == [4, 5, 6, 7, 8, 9, 10]  # slot 2 is masked and read from slot 1; slot 3 was just committed


@pytest.mark.parametrize(("shift", "first"), [(0, 3), (1, 2)])
def test_prefill_caches_the_prompt_for_good(shift: int, first: int) -> None:
    got = refreshed({"dkv_variant": "prefill", "cache_steps": 2}, one_by_one(1, 0, 3, 2, 7, 4, 6, 5), shift)
    assert got == [ALL, *[list(range(first, 11))] * 7]


@pytest.mark.parametrize("shift", [0, 1])
def test_pd_never_refreshes_the_prompt(shift: int) -> None:
    got = refreshed({"dkv_variant": "pd", "cache_steps": 3}, one_by_one(1, 0, 3, 2, 7, 4, 6, 5), shift)
    canvas = list(range(3 - shift, 11))
    assert got[0] == ALL
    assert got[3] == got[4] == got[7] == canvas  # every third step of a window, and where one begins
    if shift == 0:
        assert got[1:3] == [canvas, [3, 5, 6, 7, 8, 9, 10]]
        assert got[5:7] == [[7, 8, 9, 10], [7, 8, 9]]
    else:
        assert got[1:3] == [canvas, [3, 4, 5, 6, 7, 8, 9, 10]]
        assert got[5:7] == [[6, 7, 8, 9, 10], [7, 8, 9]]


def test_rows_reserved() -> None:
    for variant, rows in [("decode", 108), ("prefill", 9), ("pd", 9)]:
        options = resolve(ServerOptions({}), {"policy": "dkv", "dkv_variant": variant})
        assert POLICY_CLASSES["dkv"].max_rows(options, 100, 8, 5) == rows
