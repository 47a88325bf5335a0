"""elastic by hand.

docs/methods/other-caches.md, section 3; the measurement itself is in tests/ops/test_attention_drift.py.
"""

from __future__ import annotations

from typing import Any

import torch

from tests.unit.batches import Batch, FakeJob, hook_of
from tests.unit.replay import Replayed, one_by_one, replay
from vllm_d2cache.mechanisms.drift import DriftHook

P, G = 3, 8
ALL = list(range(P + G))
ORDER = one_by_one(1, 0, 3, 2, 5, 4, 7, 6)


def run(drifts: list[tuple[float, list[int]]], shift: int = 0, **options: Any) -> list[Replayed]:
    options = {"policy": "elastic", "elastic_beta": 3, **options}
    return replay(options, P, G, ORDER[: len(drifts)], shift, drifts=drifts)


def test_leftmost_masks_last_commits_and_what_is_attended_to() -> None:
    got = run([(1.0, [0]), (1.0, [0, 4]), (0.9, [2]), (0.9, [])])
    assert [s.refreshed for s in got] == [
        ALL,
        [0, 3, 4, 5, 6],  # masks 0, 2, 3, the commit 1, and the position attended to
        [0, 3, 4, 5, 6, 7],  # masks 2, 3, 4, the commit 0, and 0 and 4
        [2, 5, 6, 7, 8],  # masks 2, 4, 5, the commit 3; a similarity of 0.9 is not below 0.9
    ]
    assert [s.candidates for s in got] == [[0, 1, 2], [0, 2, 3], [2, 3, 4], [2, 4, 5]], "the window slides"


def test_a_drift_is_followed_by_everything_once() -> None:
    got = run([(0.0, []), (0.8, []), (0.1, []), (0.95, []), (0.8, []), (0.0, [])])
    # Steps 0 and 2 recompute everything: how much attention changed by that says nothing about the text.
    assert [s.refreshed == ALL for s in got] == [True, False, True, False, False, True]


def test_the_two_ends_of_the_threshold() -> None:
    drifts: list[tuple[float, list[int]]] = [(0.0, [])] * 4
    assert [s.refreshed == ALL for s in run(drifts, elastic_gamma=0)] == [True, False, False, False]
    assert [s.refreshed == ALL for s in run([(1.0, [])] * 4, elastic_gamma=1)] == [True] * 4


def test_who_looks_and_what_is_known() -> None:
    got = run([(1.0, [1]), (1.0, [1])])
    first, second = got[0].watched, got[1].watched
    assert first is not None and second is not None
    assert first.positions.tolist() == first.rows.tolist() == [3, 4, 5]
    assert first.known.tolist() == [True] * 3 + [False] * 8
    assert got[1].refreshed == [1, 3, 4, 5, 6]
    assert (second.positions.tolist(), second.rows.tolist()) == ([3, 5, 6], [1, 3, 4])
    assert second.known.nonzero().flatten().tolist() == [0, 1, 2, 4]


def test_a_shifted_family_also_computes_the_rows_its_masks_are_read_from() -> None:
    got = run([(1.0, []), (1.0, [])], shift=1)
    assert got[1].refreshed == [2, 3, 4, 5, 6]  # masks 0, 2, 3 at 3, 5, 6, read from 2, 4, 5, and the commit 1 at 4
    assert got[1].watched is not None
    assert got[1].watched.positions.tolist() == [3, 5, 6]


def test_nobody_else_is_watched() -> None:
    batch = Batch([FakeJob([1] * 4, 6, {"policy": name}) for name in ("elastic", "d2cache", "dual")])
    for i in range(3):
        batch.add(i)
    slots = [batch.slot(i) for i in range(3)]
    step = batch.runner.open(torch.tensor(slots), slots)
    assert [w is not None for w in hook_of(step, DriftHook).watched] == [True, False, False]
    assert hook_of(batch.runner.open(torch.tensor(slots[1:]), slots[1:]), DriftHook) is None
