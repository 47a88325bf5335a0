"""es: rows, who stays and why, worked out by hand from.

docs/methods/other-caches.md, section 9; the gate; slots whose rows have left.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.reference.dense import DenseModel
from tests.reference.dream import DenseDream
from tests.reference.llada import DenseLlada
from tests.reference.loop import Job, run_jobs
from tests.reference.oracle import ORACLE
from tests.unit.batches import LAYERS, Batch, FakeJob, hook_of, run_alone
from tests.unit.replay import one_by_one, replay
from vllm_d2cache.mechanisms.row_exits import RowGate
from vllm_d2cache.mechanisms.row_store import RowStore

P, G = 3, 8
ALL = list(range(11))
# Behind layers 1 and 2 of eight; everywhere behind the others.
FIRST, SECOND = 1, 2


def run(shift: int = 0, moves: tuple[int, ...] = (1, 0, 3, 2, 7, 4, 6, 5), **options: Any) -> list[Any]:
    settings = {"policy": "es", "window": 4, "prompt_update_freq": 6, "block_update_freq": 5, **options}
    return replay(settings, P, G, one_by_one(*moves), shift, num_layers=8)


def test_rows_of_each_step() -> None:
    """Everything, the window of four, then the next one, from the last commit on; all before its end in step 6."""
    got = [s.refreshed for s in run()]
    window, behind = [3, 4, 5, 6], [7, 8, 9, 10]
    assert got == [ALL, window, window, window, [5, 6, *behind], behind, ALL, behind]


def test_a_window_that_ends_early_skips_to_its_end() -> None:
    """Two a step: the second window begins with step 4 all the same, and step 6 is its third."""
    moves = [{0: 7, 1: 7}, {2: 7, 3: 7}, {4: 7}, {5: 7}, {6: 7}]
    settings = {"policy": "es", "window": 4, "prompt_update_freq": 6, "block_update_freq": 100}
    got = [s.refreshed for s in replay(settings, P, G, moves, num_layers=8)]
    assert got == [ALL, [3, 4, 5, 6], [5, 6, 7, 8, 9, 10], [7, 8, 9, 10], ALL]


def test_a_shifted_window_reaches_one_to_the_left() -> None:
    got = [s.refreshed for s in run(shift=1)]
    window, behind = [2, 3, 4, 5, 6], [6, 7, 8, 9, 10]
    assert got == [ALL, window, window, window, [5, *behind], behind, ALL, behind]


def test_nobody_leaves_when_prompt_or_window_are_due() -> None:
    got = run()
    # Steps 0 (both), 5 (window) and 6 (prompt).
    rows = [11, 4, 4, 4, 6, 4, 11, 4]
    assert [s.exiting.staying[0] for s in got] == [[n] for n in rows]
    # At least the last commit and two more.
    assert [s.exiting.staying[FIRST] for s in got] == [[11], [3], [3], [3], [3], [4], [11], [3]]
    assert [s.exiting.staying[SECOND] for s in got] == [s.exiting.staying[LAYERS - 1] for s in got]
    assert [s.exiting.staying[SECOND] for s in got] == [[11], [3], [3], [3], [3], [4], [11], [3]]


def test_shares_are_those_of_the_rows_that_came_in() -> None:
    """A window of 20: half of it, then a quarter of it; with eight commits, ten and ten."""
    moves = [{0: 7}, dict.fromkeys(range(1, 9), 7), {9: 7}]
    settings = {"policy": "es", "window": 20, "prompt_update_freq": 100, "block_update_freq": 100}
    got = replay(settings, 3, 20, moves, num_layers=8)
    assert [s.exiting.staying for s in got[1:]] == [
        [[20], [10], *[[5]] * 6],
        [[20], [10], *[[10]] * 6],
    ]


@pytest.mark.parametrize(("layers", "exits"), [(1, []), (2, []), (3, [1]), (4, [1]), (28, [4, 7]), (32, [4, 8])])
def test_exits_are_at_an_eighth_and_a_quarter_of_the_depth(layers: int, exits: list[int]) -> None:
    (step,) = replay({"policy": "es"}, P, G, one_by_one(0), num_layers=layers)
    assert [layer for layer, here in enumerate(step.exiting.exits) if here] == exits


@pytest.mark.parametrize("shift", [0, 1])
def test_what_speaks_for_a_row(shift: int) -> None:
    """After slot 2 got its token: it, the first mask, the two most confident, and every confidence halved."""
    confidences = [[0.1, 0.3, 0.9, 0.2], [0.6] + [0.0] * 3]
    settings = {"policy": "es", "window": 4, "prompt_update_freq": 100, "block_update_freq": 100}
    got = replay(settings, 3, 4, [{2: 7}, {0: 7}], shift, num_layers=8, confidences=confidences)[1]
    row = {int(t): float(b) for t, b in zip(got.refreshed, got.exiting.bias, strict=True)}
    want = dict.fromkeys(range(3 - shift, 7), 0.0)
    want[5] += 3.5  # its own position in every family
    want[3 - shift] += 5 + 0.05
    want[4 - shift] += 2 + 0.15
    want[6 - shift] += 2 + 0.1
    assert row == pytest.approx(want)
    assert got.exiting.weight.tolist() == [0.5] * len(want)


def test_confidence_alone_or_change_alone() -> None:
    confidences = [[0.9, 0.3, 0.1, 0.2], [0.6] * 4]
    for alpha, want in ((1, [3.5, 5 + 2 + 0.3, 0.1, 2 + 0.2]), (0, [3.5, 5.0, 0.0, 0.0])):
        settings = {"policy": "es", "importance_score_alpha": alpha, "window": 4, "prompt_update_freq": 100}
        got = replay(settings, 3, 4, [{0: 7}, {1: 7, 2: 7, 3: 7}], num_layers=8, confidences=confidences)[1]
        assert got.exiting.bias.tolist() == pytest.approx(want)
        assert got.exiting.weight.tolist() == [1 - alpha] * 4


def test_a_confidence_is_remembered_while_its_row_is_out() -> None:
    """Slot 3 has logits in the first step alone, in which all rows stay."""
    confidences = [[0.9, 0.1, 0.2, 0.4], [0.0, 0.6, 0.3, 0.1], [0.0, 0.0, 1.0, 0.0]]
    settings = {"policy": "es", "window": 4, "prompt_update_freq": 100, "block_update_freq": 100}
    moves, left = [{0: 7}, {1: 7}, {2: 7}], [[], [6], []]
    got = replay(settings, 3, 4, moves, num_layers=8, confidences=confidences, left=left)
    assert got[2].exiting.bias.tolist() == pytest.approx([0.0, 3.5, 5 + 2 + 0.15, 2 + 0.2])


# ---- the gate


def exiting(keep: list[dict[int, int]], bias: list[float], store: RowStore) -> RowGate:
    """One request of five rows; the first is a prompt row, without a memory."""
    remembered = {0: (torch.arange(1, 5), torch.arange(1, 5))}
    staying = [[1 + here.get(0, 4)] for here in keep]
    request = torch.zeros(5, dtype=torch.int64)
    there = torch.ones(5, dtype=torch.bool)
    return RowGate(staying, keep, remembered, {0: 6}, request, torch.tensor(bias), torch.ones(5), [3], store, there)


def test_rows_that_moved_stay_and_others_keep_their_old_memory() -> None:
    store = RowStore()
    old = torch.full((5, 4), 2.0)
    gate = exiting([{}, {0: 4}], [0.0] * 5, store)
    gate.behind(0, old, old)
    assert gate.present().tolist() == [True] * 5
    gate.behind(1, old / 2, old / 2)
    assert gate.present().tolist() == [True] * 5

    moved = old.clone()
    moved[2] += 1.0  # half of its old norm
    moved[3] += 0.5
    moved[4] += 0.2
    gate = exiting([{}, {0: 2}], [0.0, 0.0, 0.0, 0.0, 0.3], store)
    gate.behind(1, moved, torch.zeros_like(moved))
    # Changes 0, 0.5, 0.25, 0.1; the last row has a bias of 0.3.
    assert gate.present().tolist() == [True, False, True, False, True]
    kept = store.of(3, 1, 6, moved)[0]
    assert kept[1:5, 0].tolist() == [2.0, 3.0, 2.0, 2.2000000476837158]
    # What left drifts on from its old state: twice a quarter is more than a tenth now.
    moved[3] += 0.5
    gate = exiting([{}, {0: 1}], [0.0] * 5, store)
    gate.behind(1, moved, torch.zeros_like(moved))
    assert gate.present().tolist() == [True, False, False, True, False]


def test_large_changes_are_scaled_among_the_rows_still_there() -> None:
    store = RowStore()
    ones = torch.ones(5, 4)
    exiting([{0: 4}, {0: 4}], [0.0] * 5, store).behind(0, ones, 0 * ones)
    exiting([{0: 4}, {0: 4}], [0.0] * 5, store).behind(1, ones, 0 * ones)
    moved = ones.clone()
    moved[1], moved[2], moved[3] = 9.0, 3.0, 2.0  # changes 8, 2, 1, 0
    bias = [0.0, -9.0, 0.0, 0.6, 0.7]
    gate = exiting([{0: 3}, {0: 2}], bias, store)
    gate.behind(0, moved, 0 * ones)
    assert gate.present().tolist() == [True, False, True, True, True]
    # Row 1 has left: the largest change is now 2, and scores are 1, 0.5 + 0.6 and 0.7. With it they would be 0.25,
    # 0.125 + 0.6 and 0.7.
    gate.behind(1, moved, 0 * ones)
    assert gate.present().tolist() == [True, False, True, True, False]


def test_ties_go_to_the_lower_position_and_all_rows_may_be_asked_for() -> None:
    store, state = RowStore(), torch.ones(5, 4)
    for keep, want in ((4, [1, 1, 1, 1, 1]), (2, [1, 1, 1, 0, 0]), (0, [1, 0, 0, 0, 0])):
        gate = exiting([{0: keep}], [0.0] * 5, store)
        gate.behind(0, state, state)
        assert gate.present().int().tolist() == want


# ---- slots whose rows have left


def test_a_slot_whose_row_left_is_no_candidate() -> None:
    job = FakeJob([1, 2], 12, {"policy": "es", "window": 12, "block_update_freq": 100, "prompt_update_freq": 100})
    batch = Batch([job])
    batch.run()
    assert job.steps[0].predicted == list(range(12))
    for step in job.steps[1:]:
        # Three of twelve rows are left; the last commit is one of them and has no logits that anybody reads.
        assert len(step.predicted) <= 2
        assert {slot for slot, _ in step.committed} <= set(step.predicted)


def test_shadows_of_mates_are_read_as_before() -> None:
    """wino verifies by rows behind the text of all requests."""
    wino = {"policy": "full", "window": 6, "decoder": "wino", "wide_in_thres": 0.1, "narrow_out_thres": 0.9}
    jobs = [FakeJob([1, 2], 12, {"policy": "es", "window": 6}, noise=4), FakeJob([1, 2], 12, wino, noise=4)]
    Batch(jobs).run()
    assert any(step.revoked for step in jobs[1].steps)
    for job in jobs:
        assert job.steps == run_alone(job).steps


def test_rows_of_mates_stay_and_nobody_else_pays() -> None:
    batch = Batch([FakeJob([1] * 4, 12, {"policy": name}) for name in ("d2cache", "es")])
    for i in range(2):
        batch.add(i)
    slots = [batch.slot(i) for i in range(2)]
    batch.step([0, 1])
    step = batch.runner.open(torch.tensor(slots), slots)
    rows = step.rows
    gate = hook_of(step, RowGate)
    first = rows.counts[0]
    assert gate.staying[LAYERS - 1] == [first, 3]
    assert list(gate.remembered) == [1]
    assert hook_of(batch.runner.open(torch.tensor(slots[:1]), slots[:1]), RowGate) is None


# ---- against the specification in loops, on a network


@pytest.mark.parametrize("model", [DenseLlada, DenseDream])
@pytest.mark.parametrize(
    "options",
    [
        {"prompt_update_freq": 7, "block_update_freq": 3, "window": 10},
        {"prompt_update_freq": 100, "block_update_freq": 100, "window": 24, "tokens_per_step": 2},
        {"prompt_update_freq": 12, "block_update_freq": 4, "window": 12, "importance_score_alpha": 0},
        {"window": 8, "importance_score_alpha": 1, "threshold": 0.01},
    ],
)
def test_the_rows_are_those_of_the_specification(model: type[DenseModel], options: dict[str, Any]) -> None:
    """The reference works out the rows by itself and compares; every slot gets its token."""
    job = Job([5, 9, 33, 2], 24, {"policy": "es", **options})
    run_jobs([model(ORACLE / model.__name__.removeprefix("Dense").lower())], [job])
    assert job.masked_left == 0
    assert len(job.output) == 24
