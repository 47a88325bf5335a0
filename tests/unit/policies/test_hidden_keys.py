"""window_diffusion and streaming by hand. docs/methods/other-caches.md, sections 10 and 11."""

from __future__ import annotations

from typing import Any

import torch

from tests.unit.batches import Batch, FakeJob, hook_of
from tests.unit.replay import Replayed, one_by_one, replay
from vllm_d2cache.mechanisms.hidden_keys import KeysHook

P = 3


def span(*parts: tuple[int, int]) -> list[int]:
    """Ascending numbers of half-open ranges."""
    return [i for start, end in parts for i in range(start, end)]


def window_diffusion(moves: list[dict[int, int]], canvas: int = 16, shift: int = 0, **options: Any) -> list[Replayed]:
    defaults = {"outer_window": 8, "inner_window": 4, "phase_steps": 5, "window": 0}
    return replay({"policy": "window_diffusion", **defaults, **options}, P, canvas, moves, shift)


def test_a_phase_sees_known_text_and_the_outer_window() -> None:
    got = window_diffusion(one_by_one(0, 1, 2, 3, 4, 5, 6))
    first, second = span((0, 11)), span((0, 16))
    assert [s.keys for s in got] == [first] * 5 + [second] * 2
    assert got[0].refreshed == first
    assert got[5].refreshed == second


def test_rows_of_the_traced_run() -> None:
    """A = 4, one token a step: 5, 5, 6, 7 rows behind the first step of a phase."""
    got = window_diffusion(one_by_one(0, 1, 2, 3, 4))
    assert [len(s.refreshed) for s in got] == [11, 5, 5, 6, 7]
    # What the phase's first step committed is refreshed once; later commits stay until the phase ends.
    assert [s.refreshed for s in got[1:]] == [span((3, 8)), span((4, 9)), span((4, 10)), span((4, 11))]


def test_commits_come_from_the_inner_window_alone() -> None:
    """The published code lets the first step of a phase commit anywhere, and its paper does not."""
    got = window_diffusion(one_by_one(2, 0, 3))
    assert [s.candidates for s in got] == [[0, 1, 2, 3], [0, 1, 3, 4], [1, 3, 4, 5]]


def test_the_inner_window_slides_no_farther_than_the_phase_sees() -> None:
    got = window_diffusion(one_by_one(*range(6)), outer_window=5, phase_steps=100)
    assert [s.candidates for s in got[:5]] == [[0, 1, 2, 3], [1, 2, 3, 4], [2, 3, 4], [3, 4], [4]]
    assert got[5].candidates == [5, 6, 7, 8], "all that was seen is committed: the next phase begins"
    assert got[5].refreshed == got[5].keys == span((0, 13))


def test_a_shifted_family_reads_the_inner_window_one_to_the_left() -> None:
    got = window_diffusion(one_by_one(0, 1, 2), shift=1)
    assert got[1].refreshed == span((3, 8))  # slot 1 is read from slot 0, which was just committed anyway
    assert got[2].refreshed == span((4, 9))
    assert window_diffusion(one_by_one(1, 2), shift=1)[1].refreshed == span((2, 8))


def test_everything_in_sight_needs_no_list_of_keys() -> None:
    assert [s.keys for s in window_diffusion(one_by_one(0, 1), canvas=8)] == [None, None]


def streaming(moves: list[dict[int, int]], shift: int = 0, **options: Any) -> list[Replayed]:
    return replay({"policy": "streaming", "window": 4, "suffix_window": 2, **options}, P, 12, moves, shift)


def test_the_window_a_little_behind_it_and_the_last_position() -> None:
    got = streaming(one_by_one(1, 0, 3, 2, 7, 4, 6, 5, 8, 9, 10, 11))
    first, second = [*span((0, 9)), 14], [*span((0, 13)), 14]
    assert [s.keys for s in got] == [first] * 4 + [second] * 4 + [None] * 4
    assert [s.refreshed for s in got[:8]] == [first, *[[*span((3, 9)), 14]] * 3, second, *[[*span((7, 13)), 14]] * 3]
    assert [s.refreshed for s in got[8:]] == [span((0, 15)), *[span((11, 15))] * 3]
    assert got[1].candidates == [0, 2, 3]


def test_a_shifted_family_also_needs_the_position_before_the_window() -> None:
    got = streaming(one_by_one(1, 0, 3, 2, 7, 4), shift=1)
    assert got[1].refreshed == [*span((2, 9)), 14]
    assert got[5].refreshed == [*span((6, 13)), 14]


def test_without_a_suffix_the_last_position_is_still_seen() -> None:
    assert streaming(one_by_one(0, 1), suffix_window=0)[1].refreshed == [3, 4, 5, 6, 14]


def test_nobody_pays_for_keys_that_nobody_hides() -> None:
    batch = Batch([FakeJob([1, 2], 30, {"policy": name}) for name in ("streaming", "d2cache", "dual")])
    for i in range(3):
        batch.add(i)
    slots = [batch.slot(i) for i in range(3)]
    with_mate = hook_of(batch.runner.open(torch.tensor(slots), slots), KeysHook).keys
    assert with_mate[0] is None and with_mate[1:] == [None, None], "its window of 32 sees all of 30"
    assert hook_of(batch.runner.open(torch.tensor(slots[1:]), slots[1:]), KeysHook) is None
