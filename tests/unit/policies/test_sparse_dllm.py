"""sparse_dllm: the plan by hand.

docs/methods/other-caches.md, section 2; the choice of keys is in tests/ops/test_key_choice.py.
"""

from __future__ import annotations

from typing import Any

import torch

from tests.unit.batches import Batch, FakeJob, hook_of
from tests.unit.replay import Replayed, one_by_one, replay
from vllm_d2cache.mechanisms.hidden_keys import KeysHook

P, G = 5, 12
ALL = list(range(P + G))
ORDER = one_by_one(1, 0, 3, 2, 7, 4, 6, 5)


def run(shift: int = 0, **options: Any) -> list[Replayed]:
    return replay({"policy": "sparse_dllm", "window": 4, **options}, P, G, ORDER, shift)


def test_two_steps_of_everything_then_the_window_and_what_was_kept() -> None:
    got = run()
    assert [s.refreshed for s in got] == [ALL, ALL, [5, 6, 7, 8], [5, 6, 7, 8], ALL, ALL, *[[9, 10, 11, 12]] * 2]
    assert all(s.keys is None for s in got)
    choices = [None if s.choice is None else s.choice.choose for s in got]
    assert choices == [None, True, False, False, None, True, False, False]


def test_what_is_chosen_from_and_by_whom() -> None:
    choice = run()[1].choice
    assert choice is not None
    assert choice.visible.tolist() == choice.queries.tolist() == [5, 6, 7, 8]
    assert (choice.count, choice.pool) == (6, 3)  # half of the 13 outside, rounded down
    assert run(keep_ratio=0.7, kernel_size=1)[1].choice.count == 9  # 9.1
    # The queries are the window's rows among those that are refreshed.
    assert run()[2].choice.queries.tolist() == [0, 1, 2, 3]


def test_a_ratio_that_floats_do_not_hold_exactly() -> None:
    """0.7 of 10 is 7, although 0.7 in fp32 is less."""
    got = replay({"policy": "sparse_dllm", "window": 4, "keep_ratio": 0.7}, 6, 8, one_by_one(0, 1))
    assert got[1].choice is not None
    assert got[1].choice.count == 7


def test_a_shifted_family_also_refreshes_the_source_of_its_first_slot() -> None:
    got = run(shift=1)
    choice = got[2].choice
    assert choice is not None
    assert got[2].refreshed == choice.visible.tolist() == [4, 5, 6, 7, 8]
    assert choice.queries.tolist() == [1, 2, 3, 4], "the window's rows alone are averaged"
    assert choice.count == 6  # of 12


def test_choices_of_other_requests_and_of_none() -> None:
    batch = Batch([FakeJob([1] * 5, 9, {"policy": name, "window": 3}) for name in ("sparse_dllm", "dual", "streaming")])
    for i in range(3):
        batch.add(i)
    for _ in range(2):
        batch.step([0, 1, 2])
    slots = [batch.slot(i) for i in range(3)]
    step = batch.runner.open(torch.tensor(slots), slots)
    assert [choice is not None for choice in hook_of(step, KeysHook).choices] == [True, False, False]
    assert hook_of(batch.runner.open(torch.tensor(slots[1:2]), slots[1:2]), KeysHook) is None
