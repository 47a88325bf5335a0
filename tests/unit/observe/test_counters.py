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
    counters = batch.runner.counters
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


def test_keys_that_a_policy_hides_are_not_counted() -> None:
    """sparse_dllm in one window of 4 behind 10: everything twice, then the window and half of the rest."""
    batch = Batch([FakeJob([1] * 10, 4, {"policy": "sparse_dllm", "keep_ratio": 0.5, "window": 4})])
    batch.run()
    assert len(batch.jobs[0].steps) == 4
    assert batch.runner.counters.keys == 14 + 14 + 2 * (4 + 5)


def test_shadows_are_rows_but_no_keys() -> None:
    batch = Batch(
        [FakeJob([1, 2], 12, {"decoder": "wino", "policy": "full", "window": 6, "wide_in_thres": 0.1}, noise=4)]
    )
    batch.run()
    steps, counters = batch.jobs[0].steps, batch.runner.counters
    assert counters.keys == 14 * len(steps)
    # All steps but the first of each window verify.
    assert counters.rows == 14 * len(steps) + 6 * (len(steps) - 2)
    assert counters.committed - sum(len(step.revoked) for step in steps) == 12
