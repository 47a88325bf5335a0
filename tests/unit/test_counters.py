"""The counters against what the steps of a batch really did."""

from __future__ import annotations

from tests.unit.batches import Batch, FakeJob


def test_counters_are_the_sums_of_all_steps() -> None:
    jobs = [
        FakeJob([1, 2, 3], 9, {"current_k": 2}, noise=1),
        FakeJob([4] * 7, 12, {"policy": "full", "threshold": 0.4}, noise=2),
        FakeJob([4], 5, {"decoder": "eb", "gamma": 1.0}, noise=3),
    ]
    batch = Batch(jobs)
    batch.run([0, 2, 3])
    counters = batch.denoiser.counters
    steps = [(job, step) for job in jobs for step in job.steps]
    assert counters.steps == len(steps)
    assert counters.rows == sum(len(step.refreshed) for _, step in steps)
    assert counters.keys == sum(job.total for job, _ in steps)
    assert counters.predicted == sum(len(step.predicted) for _, step in steps)
    assert counters.committed == sum(job.canvas_length for job in jobs)
    assert max(len(job.steps) for job in jobs) <= counters.forwards < counters.steps
    counters.reset()
    assert counters == type(counters)()
    assert counters.committed == 0
