"""vicinity by hand. docs/methods/other-caches.md, section 6.1."""

from __future__ import annotations

from typing import Any

from tests.unit.replay import one_by_one, replay

P, G = 5, 12
ALL = list(range(P + G))
ORDER = one_by_one(1, 0, 3, 2, 7, 4, 6, 5, 8, 9, 10, 11)
LOOK = {"policy": "vicinity", "window": 4, "prefix_look": 2, "after_look": 1}


def refreshed(shift: int = 0, **options: Any) -> list[list[int]]:
    return [s.refreshed for s in replay({**LOOK, **options}, P, G, ORDER, shift)]


def test_the_window_and_its_vicinity() -> None:
    first, second, third = list(range(3, 10)), list(range(7, 14)), list(range(11, 17))
    want = [ALL, *[first] * 3, ALL, *[second] * 3, ALL, *[third] * 3]
    assert refreshed(warmup_steps=0) == want
    # A look of one position or more has the source of a shifted family's first slot in it.
    assert refreshed(warmup_steps=0, shift=1) == want


def test_warming_up_takes_one_more_step_than_its_name_says() -> None:
    """The warm-up steps store nothing as published; the step behind them does."""
    full = [step == ALL for step in refreshed(warmup_steps=2)]
    assert full == [True] * 3 + [False] + [True, False, False, False] * 2
    full = [step == ALL for step in refreshed(warmup_steps=5)]
    assert full == [True] * 6 + [False, False] + [True, False, False, False]


def test_periodic_refreshes_begin_behind_the_first_window() -> None:
    full = [step == ALL for step in refreshed(warmup_steps=0, cache_update_freq=3)]
    #       step 0, then 4 and 8 for their windows, 6 and 9 for the period; 3 lies in the first window
    assert [i for i, f in enumerate(full) if f] == [0, 4, 6, 8, 9]


def test_without_looking_around_a_shifted_family_still_reads_its_first_slot() -> None:
    got = refreshed(warmup_steps=0, prefix_look=0, after_look=0, shift=1)
    assert got[1] == [4, 5, 6, 7, 8]
    assert refreshed(warmup_steps=0, prefix_look=0, after_look=0)[1] == [5, 6, 7, 8]


def test_looks_end_with_the_text() -> None:
    assert refreshed(warmup_steps=0, prefix_look=10**12, after_look=10**12) == [ALL] * 12
