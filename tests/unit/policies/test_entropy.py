"""entropy by hand. docs/methods/other-caches.md, section 7."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.unit.batches import VOCAB, Batch, FakeJob, without_layers
from tests.unit.replay import one_by_one, replay
from tests.unit.views import outcome_of, view_of
from vllm_d2cache.canvas.traits import FamilyTraits
from vllm_d2cache.mechanisms.base import Worker
from vllm_d2cache.policies import POLICY_CLASSES

P, G = 3, 8
ALL = list(range(P + G))
SURE = [0.0] * 8


def refreshed(moves: list[dict[int, int]], entropies: list[float], shift: int = 0, **options: Any) -> list[list[int]]:
    options = {"policy": "entropy", "window": 4, "entropy_tau": 0.5, "entropy_k": 2, **options}
    return [s.refreshed for s in replay(options, P, G, moves, shift, entropies)]


def test_masks_of_the_window_and_the_latest_commits() -> None:
    moves = one_by_one(1, 0, 3, 2, 7, 4, 6, 5)
    assert refreshed(moves, SURE) == [
        ALL,
        [3, 4, 5, 6],  # slots 0, 2, 3 are masked, slot 1 is the latest
        [3, 4, 5, 6],  # 2, 3 masked, 0 and 1 latest
        [3, 5, 6],  # 2 masked, 3 and 0 latest
        [5, 6, 7, 8, 9, 10],  # a new window: 4 to 7 masked, 2 and 3 latest
        [5, 7, 8, 9, 10],  # 4, 5, 6 masked, 7 and 2 latest
        [7, 8, 9, 10],
        [7, 8, 9],
    ]


def test_an_uncertain_commit_is_followed_by_everything() -> None:
    moves = one_by_one(1, 0, 3, 2)
    full = [step == ALL for step in refreshed(moves, [0.4, 0.6, 0.5, 0.0])]
    assert full == [True, False, True, False], "0.5 does not exceed 0.5"


def test_the_most_uncertain_commit_of_a_step_decides() -> None:
    """One of three commits has an entropy above the threshold."""
    view = view_of(["...#", "...#"], [2, 2])
    made = POLICY_CLASSES["entropy"](Worker(4, 16, torch.device("cpu"), FamilyTraits(0)))
    made._options.columns["entropy_tau"][:] = 0.5
    made.first_plan(view)
    outcome = outcome_of(view, committed=[[0, 1, 2], [0, 1, 2]])
    entropy = torch.tensor([[0.1, 0.9, 0.2, 9.0], [0.1, 0.2, 0.3, 9.0]])
    got = made.next_plan(view, type(outcome)(**{**vars(outcome), "entropy": entropy})).refresh
    assert got.all(1).tolist() == [True, False]


def test_ties_in_the_order_go_to_the_lower_slot_but_no_commit_is_left_out() -> None:
    moves = [{0: 7}, {1: 7, 2: 7, 3: 7}, {5: 7}, {4: 7}]
    assert refreshed(moves, SURE, window=8, entropy_k=2)[2] == [4, 5, 6, 7, 8, 9, 10]
    assert refreshed(moves, SURE, window=8, entropy_k=2)[3] == [4, 7, 8, 9, 10]  # slots 5 and 1; 4, 6, 7 masked
    assert refreshed(moves, SURE, window=8, entropy_k=0)[3] == [7, 8, 9, 10]


def test_a_shifted_family_reads_its_masks_one_to_the_left() -> None:
    got = refreshed(one_by_one(1, 0, 3, 2), SURE, shift=1)
    assert got[1] == [2, 3, 4, 5, 6]  # masks 0, 2, 3, their left neighbours, and the latest commit, slot 1
    assert got[3] == [3, 4, 5, 6]  # mask 2 and its neighbour 1, the latest commits 3 and 0


@pytest.mark.parametrize(("options", "want"), [({"policy": "entropy"}, True), ({}, False), ({"policy": "dual"}, False)])
def test_entropies_are_computed_for_those_who_read_them(options: dict[str, Any], want: bool) -> None:
    batch = Batch([FakeJob([1, 2], 5, options)])
    batch.add(0)
    slot = batch.slot(0)
    step = batch.runner.open(torch.tensor([slot]), [slot])
    rows = step.rows
    logits = torch.zeros(len(rows.logits_rows), VOCAB)
    step.hooks = without_layers(step, [batch.jobs[0].numbers()[1]])
    stats = batch.runner.close(step, logits, torch.clone).stats
    assert (stats.margin is not None, stats.entropy is not None) == (False, want)
