"""Properties of the decoding loop that hold for every request, whatever its options and its company."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.reference.llada import DenseLlada
from tests.reference.loop import Job, run_jobs
from tests.reference.oracle import ORACLE
from tests.unit.batches import MASK, VOCAB, Batch, FakeJob, run_alone
from tests.unit.strategies import POLICIES, jobs
from vllm_d2cache.canvas.request import Request
from vllm_d2cache.canvas.traits import FamilyTraits
from vllm_d2cache.canvas.view import CanvasView
from vllm_d2cache.decoders import DECODER_CLASSES
from vllm_d2cache.mechanisms.base import Worker
from vllm_d2cache.options.sampling import SamplingSpec
from vllm_d2cache.options.server import ServerOptions
from vllm_d2cache.policies import POLICY_CLASSES
from vllm_d2cache.requests.resolve import resolve
from vllm_d2cache.step.runner import StepRunner


@given(jobs())
def test_every_slot_is_committed_exactly_once(job: FakeJob) -> None:
    done = run_alone(job)
    slots = [slot for step in done.steps for slot, _ in step.committed]
    assert sorted(slots) == list(range(job.canvas_length))
    assert len(done.output) == job.canvas_length
    assert all(step.committed for step in done.steps), "every step makes progress"
    assert done.steps[0].full or POLICY_CLASSES[job.options["policy"]].uses
    assert done.steps[-1].masked == []


@given(jobs(stops=True))
def test_commits_lie_where_predicted_and_inside_the_window(job: FakeJob) -> None:
    done = run_alone(job)
    for step in done.steps:
        slots = [slot for slot, _ in step.committed]
        assert set(slots) <= set(step.predicted) & set(step.window)
        assert not set(slots) & set(step.masked)
        assert {len(job.prompt) + slot for slot in step.predicted} <= set(step.refreshed)


@given(jobs())
def test_windows_fill_up_from_left_to_right(job: FakeJob) -> None:
    done = run_alone(job)
    for step, after in zip(done.steps, done.steps[1:], strict=False):
        assert after.window.start >= step.window.start
        assert after.window.start % (job.options.get("window") or job.canvas_length) == 0
        assert not step.masked or after.window.start <= step.masked[0] < after.window.stop


@given(jobs(stops=True))
def test_the_emitted_prefix_is_the_final_text(job: FakeJob) -> None:
    done = run_alone(job)
    token = dict(pair for step in done.steps for pair in step.committed)
    count = 0
    known: set[int] = set()
    for step in done.steps:
        known |= {slot for slot, _ in step.committed}
        count += len(step.emitted)
        assert count == next(g for g in range(job.canvas_length + 1) if g not in known), "all that is contiguous"
    assert done.output == [token[g] for g in range(count)]
    assert MASK not in done.output


@settings(max_examples=40)
@given(st.lists(st.tuples(jobs(stops=True), st.integers(0, 12)), min_size=2, max_size=5))
def test_a_request_does_not_depend_on_its_mates(members: list[tuple[FakeJob, int]]) -> None:
    together = [job for job, _ in members]
    Batch(together).run([start for _, start in members])
    for job in together:
        alone = run_alone(job)
        assert alone.steps == job.steps
        assert alone.output == job.output


@given(jobs(stops=True), jobs(), st.integers(1, 6))
def test_a_reused_slot_remembers_nothing(before: FakeJob, job: FakeJob, steps: int) -> None:
    want = run_alone(job)
    # The first tenant leaves in mid-run, as an aborted request does.
    batch = Batch([before.fresh(), job.fresh()])
    batch.slot = lambda i: 1  # type: ignore[method-assign]
    batch.add(0)
    for _ in range(steps):
        if not batch.jobs[0].done:
            batch.step([0])
    batch.runner.remove(1)
    batch.add(1)
    while not batch.jobs[1].done:
        batch.step([1])
    assert batch.jobs[1].steps == want.steps


def test_what_an_earlier_tenant_left_behind_its_successor_is_not_refreshed() -> None:
    """A wider mate brings the columns past a short request's text into view."""
    tenant, short, wide = FakeJob([1] * 30, 10), FakeJob([1] * 3, 4, noise=1), FakeJob([1] * 20, 18, noise=2)
    batch = Batch([tenant, short, wide])
    batch.slot = lambda i: (1, 1, 2)[i]  # type: ignore[method-assign]
    batch.add(0)
    batch.runner.remove(1)
    batch.add(1)
    batch.add(2)
    while not short.done:
        batch.step([1, 2])
    assert short.steps == run_alone(short).steps


@given(jobs())
def test_no_row_is_predicted_that_nobody_reads(job: FakeJob) -> None:
    """Besides the window's, d2Cache reads the first step's statistics, or all of them where it remembers the latest.

    And a decoder may read all that can be had.
    """
    done = run_alone(job)
    if DECODER_CLASSES[job.options.get("decoder", "confidence")].observes_all:
        assert all(set(step.predicted) <= set(range(job.canvas_length)) for step in done.steps)
        return
    remembers = job.options.get("policy", "d2cache") == "d2cache"
    latest = remembers and job.options.get("confidence_memory") == "latest"
    for n, step in enumerate(done.steps):
        assert latest or (remembers and n == 0) or set(step.predicted) <= set(step.window)
    assert not remembers or len(done.steps[0].predicted) == job.canvas_length


@given(jobs("d2cache"))
def test_all_of_k_and_p_is_the_full_policy(job: FakeJob) -> None:
    everything = replace(job, options={**job.options, "current_k": 100, "rollout_p": 1.0})
    decoding = {name: value for name, value in job.options.items() if name not in POLICIES["d2cache"]}
    full = replace(job, options={**decoding, "policy": "full"})
    got, want = run_alone(everything), run_alone(full)
    assert [s.refreshed for s in got.steps] == [s.refreshed for s in want.steps]
    assert [s.committed for s in got.steps] == [s.committed for s in want.steps]


@given(jobs(stops=True))
def test_after_a_stop_token_nothing_behind_it_is_committed(job: FakeJob) -> None:
    done = run_alone(job)
    end = job.canvas_length
    for step in done.steps:
        assert all(slot < end for slot in step.predicted)
        end = min([end, *(slot for slot, token in step.committed if token in job.sampling.stop_token_ids)])
    text = done.output[: end + 1]
    assert len(done.output) >= len(text)
    assert not set(text[:end]) & set(job.sampling.stop_token_ids)
    assert end == job.canvas_length or text[end] in job.sampling.stop_token_ids


@given(jobs(), st.integers(0, 30))
def test_a_restart_emits_exactly_the_rest(job: FakeJob, emitted: int) -> None:
    want = run_alone(job)
    emitted = min(emitted, job.canvas_length - 1)
    again = job.fresh()
    again.emitted_before = emitted
    Batch([again]).run()
    assert again.output == want.output[emitted:]
    assert [s.committed for s in again.steps] == [s.committed for s in want.steps]


@given(jobs(), st.integers(1, 8))
def test_a_preempted_request_resumes_in_the_same_slot(job: FakeJob, steps: int) -> None:
    want = run_alone(job)
    first = job.fresh()
    batch = Batch([first])
    batch.add(0)
    for _ in range(steps):
        if not first.done:
            batch.step([0])
    if first.done:
        return
    batch.runner.remove(batch.slot(0))
    rest = job.fresh()
    rest.emitted_before = len(first.output)
    batch.jobs = [rest]
    batch.add(0)
    while not rest.done:
        batch.step([0])
    assert first.output + rest.output == want.output


def test_mask_ids_in_the_prompt_are_prompt_tokens() -> None:
    job = FakeJob([1, MASK, MASK, 3, MASK], 6, {"current_k": 2})
    batch = Batch([job])
    batch.run()
    canvas = batch.runner.canvas
    assert canvas.tokens[batch.slot(0), :5].tolist() == job.prompt
    assert sorted(s for step in job.steps for s, _ in step.committed) == list(range(6))


def test_the_network_sees_committed_tokens_and_masks() -> None:
    job = FakeJob([1, 2], 5, {"policy": "full"})
    batch = Batch([job])
    batch.add(0)
    slot = batch.slot(0)
    known: dict[int, int] = {}
    for _ in range(5):
        step = batch.runner.open(torch.tensor([slot]), [slot])
        rows = step.rows
        assert rows.input_ids.tolist() == [1, 2, *(known.get(g, MASK) for g in range(5))]
        batch.step([0])
        known |= dict(job.steps[-1].committed)


def test_one_token_per_step_by_default_and_as_many_as_asked() -> None:
    assert [len(s.committed) for s in run_alone(FakeJob([1], 7)).steps] == [1] * 7
    job = FakeJob([1], 7, {"tokens_per_step": 3})
    assert [len(s.committed) for s in run_alone(job).steps] == [3, 3, 1]


@pytest.mark.parametrize("count", [10**7, 10**12, 10**19, 10**30])
def test_any_tokens_per_step_that_options_allow_finishes(count: int) -> None:
    assert len(run_alone(FakeJob([1], 7, {"tokens_per_step": count})).steps) == 1


@pytest.mark.parametrize("width", [10**3, 2**30, 10**12, 10**19, 10**30])
def test_any_inflation_that_options_allow_stays_between_members(width: int) -> None:
    job = run_alone(FakeJob([1] * 9, 6, {"current_k": 1, "rollout_p": 0, "inflate_w": width}))
    other = run_alone(FakeJob([1] * 9, 6, {"current_k": 1, "rollout_p": 0, "inflate_w": 15}))
    assert job.steps == other.steps
    assert not all(step.full for step in job.steps)


@pytest.mark.parametrize("width", [1e-30, 1e20, 1e39, 1e300])
def test_any_sigma_that_options_allow_finishes(width: float) -> None:
    job = FakeJob([1] * 3, 6, {"sigma": width, "selection_sigma": width, "factor": width})
    assert len(run_alone(job).output) == 6


@pytest.mark.parametrize("shift", [0, 1])
def test_shifted_logits_come_from_the_position_on_the_left(shift: int) -> None:
    batch = Batch([FakeJob([1, 2, 3], 4, {"policy": "full"})], shift=shift)
    batch.add(0)
    slot = batch.slot(0)
    step = batch.runner.open(torch.tensor([slot]), [slot])
    rows = step.rows
    assert rows.positions[rows.logits_rows].tolist() == [3 + g - shift for g in range(4)]


@pytest.mark.parametrize("options", [{}, {"window": 3}, {"current_k": 1}, {"threshold": 0.3, "window": 4}])
def test_shifted_families_finish(options: dict) -> None:
    job = FakeJob([1, 2, 3], 11, options)
    Batch([job], shift=1).run()
    assert len(job.output) == 11
    assert all(step.committed for step in job.steps)


@pytest.mark.parametrize("budget", [1, 2, 7])
def test_shifted_families_finish_within_a_budget(budget: int) -> None:
    jobs = [FakeJob([1, 2, 3], 11, {"window": 4}), FakeJob([1], 6), FakeJob([4] * 9, 8, {"tokens_per_step": 3})]
    Batch(jobs, {"refresh_budget": budget}, shift=1).run()
    for job in jobs:
        assert len(job.output) == job.canvas_length
        assert all(len(step.refreshed) <= budget for step in job.steps[1:])


def test_sampling_depends_on_the_seed_alone() -> None:
    def text(seed: int) -> list[int]:
        return run_alone(FakeJob([1], 12, sampling=SamplingSpec(1.5, seed=seed))).output

    assert text(7) == text(7)
    assert len({tuple(text(seed)) for seed in range(5)}) > 1


def test_greedy_requests_ignore_nucleus_and_top_k() -> None:
    plain = run_alone(FakeJob([1], 9))
    filtered = run_alone(FakeJob([1], 9, sampling=SamplingSpec(0.0, top_p=0.1, top_k=1)))
    assert plain.steps == filtered.steps


@settings(max_examples=5)
@given(st.data())
def test_the_dense_model_in_any_company(data: st.DataObject) -> None:
    """The same independence with real attention in place of random numbers."""

    def draw_job() -> Job:
        fake = data.draw(jobs())
        return Job([t % 12 for t in fake.prompt], fake.canvas_length, fake.options, fake.sampling)

    members = [draw_job() for _ in range(3)]
    run_jobs([DenseLlada(ORACLE / "llada") for _ in members], members, start_at=[0, 2, 3])
    for job in members:
        alone = Job(job.prompt, job.canvas_length, job.options, job.sampling)
        run_jobs([DenseLlada(ORACLE / "llada")], [alone])
        assert alone.output == job.output
        assert [s[0] for s in alone.steps] == [s[0] for s in job.steps]


def test_stop_ids_of_different_lengths_do_not_mix() -> None:
    """The table of stop ids widens when a request brings more of them."""
    few = FakeJob([1], 12, sampling=SamplingSpec(stop_token_ids=(2,)), noise=1)
    none = FakeJob([1], 12, noise=2)
    many = FakeJob([1], 12, sampling=SamplingSpec(stop_token_ids=tuple(t for t in range(VOCAB) if t != MASK)), noise=3)
    batch = [few, none, many]
    Batch(batch).run([0, 0, 2])
    assert len(none.output) == 12
    assert [job.output for job in batch] == [run_alone(job).output for job in batch]


def test_add_takes_any_integer_array() -> None:
    batch = Batch([FakeJob([1, 2, 3], 4)])
    request = Request("x", 3, 4, resolve(ServerOptions({}), {}), SamplingSpec())
    for dtype in (np.int32, np.int64):
        batch.runner.add(0, request, np.array([[9, 8, 7], [3, 2, 1]], dtype=dtype)[1, ::-1])
        assert batch.runner.canvas.tokens[0, :7].tolist() == [1, 2, 3, *[MASK] * 4]


def test_texts_are_read_again_only_when_somebody_enters_or_leaves() -> None:
    """What a step has left is what the tables say; a set of other requests is read from them."""
    runner = StepRunner(Worker(3, 12, torch.device("cpu"), FamilyTraits(MASK)))
    request = Request("r", 4, 6, resolve(ServerOptions({}), {"policy": "full"}), SamplingSpec())
    for slot in (0, 2):
        runner.add(slot, replace(request), np.arange(4))

    def step(slots: list[int]) -> CanvasView:
        opened = runner.open(torch.tensor(slots), slots)
        assert opened.rows is not None
        hidden = torch.rand(len(opened.rows.logits_rows), VOCAB)
        runner.close(opened, hidden, torch.clone)
        return opened.rows.view

    def read() -> CanvasView:
        runner.canvas._latest = None
        return runner.canvas.view(torch.tensor([2, 0]), [2, 0])

    step([2, 0])
    kept = runner.canvas.view(torch.tensor([2, 0]), [2, 0])
    assert step([2, 0]) is kept
    kept = runner.canvas.view(torch.tensor([2, 0]), [2, 0])
    again = read()
    assert again is not kept
    for mine, other in zip(kept.texts, again.texts, strict=True):
        assert torch.equal(mine, other)
    assert kept.step.tolist() == [2, 2]
    step([2])
    assert step([2, 0]).step.tolist() == [3, 2]
    runner.add(0, replace(request), np.arange(4))  # starts over
    assert step([2, 0]).step.tolist() == [4, 0]
    runner.remove(2)
    runner.add(2, replace(request), np.arange(4))
    assert step([2, 0]).step.tolist() == [0, 1]
