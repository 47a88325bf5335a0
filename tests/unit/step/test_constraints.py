"""Biases, bans, minimum length and penalties: each commit is the best token of the edited logits."""

from __future__ import annotations

from dataclasses import replace

import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.batches import MASK, VOCAB, Batch, FakeJob, run_alone
from tests.unit.edits import NEVER, edited, specs
from tests.unit.strategies import jobs
from vllm_d2cache.canvas.request import EditSpec, SamplingSpec


def with_edits(job: FakeJob, spec: EditSpec, **sampling: object) -> FakeJob:
    return replace(job, sampling=replace(job.sampling, edits=spec, **sampling), steps=[], output=[], logprobs=[])


def check_greedy(job: FakeJob) -> None:
    """Replays the commits of a finished greedy job in plain loops."""
    canvas = {i: t for i, t in enumerate(job.given) if t >= 0}
    for n, step in enumerate(job.steps):
        logits = job.numbers(n)[0]
        for slot, token in step.committed:
            row = logits[len(job.prompt) + slot].tolist()
            row = edited(row, job.sampling.edits, slot, job.prompt, list(canvas.values()))
            row[MASK] = NEVER
            best = max(row)
            # The plugin works in float32.
            assert row[token] > NEVER
            assert best - row[token] <= 1e-5 * max(1.0, abs(best)), (slot, token)
        canvas.update(step.committed)


greedy = jobs(stops=True).map(lambda job: replace(job, sampling=replace(job.sampling, temperature=0.0)))


@given(greedy, specs)
def test_the_best_token_of_the_edited_logits_is_committed(job: FakeJob, spec: EditSpec) -> None:
    job = with_edits(job, spec, stop_token_ids=spec.stop_ids)
    done = run_alone(job)
    check_greedy(done)
    assert not set(done.output) & set(spec.banned)
    assert not spec.allowed or set(done.output) <= set(spec.allowed)
    assert not set(done.output[: spec.min_tokens]) & set(spec.stop_ids)


@given(st.lists(st.tuples(jobs(stops=True), st.one_of(st.just(EditSpec()), specs)), min_size=2, max_size=4))
def test_edits_do_not_reach_mates(members: list[tuple[FakeJob, EditSpec]]) -> None:
    together = [with_edits(job, spec) for job, spec in members]
    Batch(together).run()
    for job in together:
        alone = run_alone(job)
        assert alone.steps == job.steps
        assert alone.output == job.output


@given(jobs(), specs, jobs())
def test_a_reused_slot_remembers_no_edits(before: FakeJob, spec: EditSpec, job: FakeJob) -> None:
    asks = with_edits(job, EditSpec(banned=(1,)))  # so that the tables are read at all
    want = run_alone(asks)
    batch = Batch([with_edits(before, spec), asks.fresh()])
    batch.slot = lambda i: 1  # type: ignore[method-assign]
    batch.add(0)
    batch.step([0])
    batch.runner.remove(1)
    batch.add(1)
    while not batch.jobs[1].done:
        batch.step([1])
    assert batch.jobs[1].steps == want.steps


def test_a_large_bias_decides_and_a_penalty_sees_tokens_on_both_sides() -> None:
    job = FakeJob([1, 2], 6, {"sigma": 0})
    assert run_alone(with_edits(job, EditSpec(bias=((7, 100.0),)))).output == [7] * 6
    # Each token may be written once: six different ones, in whatever order the slots were filled.
    once = run_alone(with_edits(job, EditSpec(penalties=(1.0, 0.0, 100.0)))).output
    assert len(set(once)) == 6


def test_minimum_length_holds_where_the_stop_token_is_all_the_model_wants() -> None:
    spec = EditSpec(bias=((3, 100.0),), min_tokens=4, stop_ids=(3,))
    done = run_alone(FakeJob([1], 9, {"sigma": 0}, SamplingSpec(stop_token_ids=(3,), edits=spec)))
    assert 3 not in done.output[:4]
    assert done.output[4] == 3


def test_a_token_is_not_penalised_for_itself_where_it_is_verified() -> None:
    """It would be taken back for standing where it stands; another slot that wants the same token is penalised."""
    options = {"decoder": "wino", "policy": "full", "wide_in_thres": 1.0, "sigma": 0}
    batch = Batch([FakeJob([1], 4, options, SamplingSpec(edits=EditSpec(penalties=(2.0, 1.0, 8.0))))])
    batch.add(0)
    batch.step([0])
    ((written, token),) = batch.jobs[0].steps[0].committed
    step = batch.runner.open(torch.tensor([batch.slot(0)]), [batch.slot(0)])
    rows = step.rows
    edits = batch.runner.constraints.of_slots(rows, torch.zeros(4, dtype=torch.int64), torch.arange(4))
    assert edits is not None
    logits = torch.zeros(4, VOCAB)
    edits.apply(logits)
    assert [slot for slot in range(4) if logits[slot, token] < 0] == [slot for slot in range(4) if slot != written]


def test_nobody_asks_nothing_is_built() -> None:
    batch = Batch([FakeJob([1, 2], 4, sampling=SamplingSpec(edits=EditSpec(stop_ids=(3,))))])
    batch.add(0)
    slots = [batch.slot(0)]
    step = batch.runner.open(torch.tensor(slots), slots)
    rows = step.rows
    assert batch.runner.constraints.of_slots(rows, *rows.predicted_index) is None
