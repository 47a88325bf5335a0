"""Each emitted token comes with the log-probabilities of the step that committed it, whoever shares the batch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.batches import Batch, FakeJob, run_alone
from tests.unit.strategies import jobs
from vllm_d2cache.canvas.request import SamplingSpec


def asking(job: FakeJob, count: int | None) -> FakeJob:
    return replace(job, sampling=replace(job.sampling, num_logprobs=count), steps=[], output=[], logprobs=[])


def check(job: FakeJob) -> None:
    """Against the numbers of the step in which each slot was committed."""
    step_of = {slot: n for n, step in enumerate(job.steps) for slot, _ in step.committed}
    count = job.sampling.num_logprobs
    if count is None:
        assert job.logprobs == []
        return
    assert len(job.logprobs) == len(job.output)
    for i, (ids, values, rank) in enumerate(job.logprobs):
        slot = job.emitted_before + i
        logits = job.numbers(step_of[slot])[0][len(job.prompt) + slot]
        want = logits.double().log_softmax(-1)
        top = sorted(range(len(want)), key=lambda t: (-float(logits[t]), t))[:count]
        # Columns past a request's own count are its mates'; vLLM cuts them off.
        ids, values = ids[: count + 1], values[: count + 1]
        assert ids == [job.output[i], *top]
        torch.testing.assert_close(torch.tensor(values).double(), want[ids], rtol=0, atol=1e-5)
        assert rank == int((logits >= logits[job.output[i]]).sum())


@given(jobs(stops=True), st.integers(0, 4))
def test_taken_at_the_commit_and_delivered_with_the_token(job: FakeJob, count: int) -> None:
    check(run_alone(asking(job, count)))


@given(st.lists(st.tuples(jobs(), st.integers(0, 8), st.sampled_from([None, 0, 1, 3])), min_size=2, max_size=5))
def test_mates_change_nothing(members: list[tuple[FakeJob, int, int | None]]) -> None:
    together = [asking(job, count) for job, _, count in members]
    Batch(together).run([start for _, start, _ in members])
    for job in together:
        check(job)


def test_a_token_that_was_taken_back_leaves_none_behind() -> None:
    options = {"decoder": "wino", "policy": "full", "window": 6, "wide_in_thres": 0.1}
    done = run_alone(asking(FakeJob([1, 2], 12, options, noise=4), 2))
    assert any(step.revoked for step in done.steps)
    check(done)


def test_asking_changes_no_token() -> None:
    job = FakeJob([1, 2, 3], 12, {"window": 5})
    assert run_alone(asking(job, 2)).output == run_alone(job).output


def test_after_a_preemption_only_new_tokens_bring_theirs() -> None:
    job = asking(FakeJob([1, 2, 3], 12), 2)
    job.emitted_before = 4
    Batch([job]).run()
    assert len(job.output) == 8
    check(job)


def test_memory_is_taken_for_those_who_ask_and_given_back() -> None:
    quiet, wide = FakeJob([1], 9), asking(FakeJob([1], 17, noise=3), 4)
    batch = Batch([quiet, wide])
    recorder = batch.runner.logprobs
    batch.add(0)
    assert recorder._ids.numel() == 0
    batch.add(1)
    assert recorder._ids.shape == (1, 17, 5)
    batch.step([0, 1])
    recorder.remove(batch.slot(1))
    assert recorder._ids.numel() == recorder._logprobs.numel() == recorder._ranks.numel() == 0


def test_a_freed_line_is_used_again_and_remembers_nothing() -> None:
    first, second, third = (asking(FakeJob([1], 6, noise=n), 3) for n in range(3))
    batch = Batch([first, second, third])
    batch.add(0)
    batch.add(1)
    batch.step([0, 1])
    batch.runner.logprobs.remove(batch.slot(0))
    batch.runner.remove(batch.slot(0))
    batch.add(2)
    assert batch.runner.logprobs._ids.shape[0] == 2
    while not (second.done and third.done):
        batch.step([i for i in (1, 2) if not batch.jobs[i].done])
    check(second)
    check(third)


@pytest.mark.parametrize("spec", [SamplingSpec(), SamplingSpec(temperature=1.0, seed=3)])
def test_no_row_asks_no_work_is_done(spec: SamplingSpec) -> None:
    job = FakeJob([1, 2], 5, sampling=spec)
    batch = Batch([job])
    batch.run()
    assert job.logprobs == []
