"""Padded steps: rows the host can count beforehand, and the same decisions as with exact rows."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.batches import Batch, FakeJob
from tests.unit.strategies import jobs
from vllm_d2cache.canvas.request import EditSpec, SamplingSpec
from vllm_d2cache.ops.packing import pack_columns

PLAIN = st.one_of([jobs(policy) for policy in ("d2cache", "d2cache", "full", "prefix", "dual", "dkv", "vicinity")])


@settings(max_examples=60)
@given(st.lists(st.tuples(PLAIN, st.integers(0, 9)), min_size=1, max_size=4), st.sampled_from([0, 1]))
def test_padded_and_exact_steps_decide_the_same(members: list[tuple[FakeJob, int]], shift: int) -> None:
    exact, padded = ([job.fresh() for job, _ in members] for _ in range(2))
    starts = [start for _, start in members]
    Batch(exact, shift=shift).run(starts)
    Batch(padded, shift=shift, pads=True).run(starts)
    for want, got in zip(exact, padded, strict=True):
        assert got.steps == want.steps
        assert got.output == want.output


def test_padded_steps_are_taken() -> None:
    """The property above compares something: all steps are padded but first ones and those beside a first one."""
    plain, first = FakeJob([1, 2, 3], 6), FakeJob([4] * 5, 4, noise=1)
    batch = Batch([plain, first], pads=True)
    batch.run([0, 3])
    assert len(plain.steps) == 6
    assert len(first.steps) == 4
    # Steps 1, 2, and 4 to 6: the second request's first step has exact rows.
    assert batch.padded_steps == 5


@pytest.mark.parametrize(
    "job",
    [
        FakeJob([1, 2], 6, {"policy": "sparse_dllm"}),
        FakeJob([1, 2], 6, {"policy": "dllm_cache"}),
        FakeJob([1, 2], 6, {"policy": "elastic"}),
        FakeJob([1, 2], 6, {"decoder": "klass"}),
        FakeJob([1, 2], 6, sampling=SamplingSpec(edits=EditSpec(banned=(3,)))),
    ],
)
def test_what_needs_exact_rows_gets_them(job: FakeJob) -> None:
    mate = FakeJob([1, 2, 3], 12, noise=1)
    batch = Batch([job, mate], pads=True)
    batch.run()
    assert 0 < batch.padded_steps < len(mate.steps) - 1


def test_a_padded_step_is_as_wide_as_the_budgets() -> None:
    wide, narrow = FakeJob([1] * 9, 8, {"current_k": 4, "rollout_p": 0.3}), FakeJob([2] * 3, 4, {"current_k": 1})
    batch = Batch([wide, narrow], pads=True)
    for i in range(2):
        batch.add(i)
    batch.step([0, 1])
    slots = [batch.slot(0), batch.slot(1)]
    step = batch.runner.open(torch.tensor(slots), slots, padded=True)
    rows = step.rows
    budgets = [batch.runner.canvas.requests[s].row_budget for s in slots]
    assert rows.counts == budgets
    assert rows.positions.shape == rows.live.shape == (sum(budgets),)
    assert rows.refreshed.tolist() == [int(part.sum()) for part in rows.live.split(budgets)]
    assert not rows.live.all()
    # Live rows come first, ascending.
    for part, positions in zip(rows.live.split(budgets), rows.positions.split(budgets), strict=True):
        assert part.tolist() == sorted(part.tolist(), reverse=True)
        assert positions[part].tolist() == sorted(set(positions[part].tolist()))
    assert len(rows.logits_rows) == min(budgets[0], 8) + min(budgets[1], 4)


def test_packing_by_hand() -> None:
    marked = torch.tensor([[0, 1, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]], dtype=torch.bool)
    packed = pack_columns(marked, torch.tensor([0, 3, 4]), torch.tensor([3, 1, 2]), 6)
    assert packed.line.tolist() == [0, 0, 0, 1, 2, 2]
    # The third line has more than its places hold; nothing of it stands elsewhere.
    assert packed.column.tolist() == [1, 2, -1, -1, 0, 1]
    assert packed.place[0].tolist() == [-1, 0, 1, 1]
