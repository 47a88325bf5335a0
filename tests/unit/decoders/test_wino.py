"""WINO: drafts, verification, and that nothing emitted is taken back."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.batches import MASK, Batch, FakeJob, hook_of, run_alone
from tests.unit.decoders.test_decoders import chosen, made, step_of
from tests.unit.strategies import jobs
from vllm_d2cache.mechanisms.shadows import ShadowHook, Verified
from vllm_d2cache.options.types import OptionError
from vllm_d2cache.policies.budget import extra_rows
from vllm_d2cache.requests.fit import check_options_fit
from vllm_d2cache.requests.resolve import parse_server_options, resolve

wino_options = st.fixed_dictionaries(
    {
        "decoder": st.just("wino"),
        "policy": st.just("full"),
        "wide_in_thres": st.sampled_from([0.0, 0.3, 0.6]),
        "narrow_out_thres": st.sampled_from([0.2, 0.6, 1.0]),
        "window": st.sampled_from([0, 1, 3, 8]),
        "tokens_per_step": st.sampled_from([1, 2, 50]),
        "sigma": st.sampled_from([0, 3]),
    }
)


def wino_jobs(stops: bool = False) -> st.SearchStrategy[FakeJob]:
    return st.builds(lambda job, options: replace(job, options=options), jobs(stops=stops), wino_options)


def test_the_draft_by_hand() -> None:
    decoder = made("wino", wide_in_thres=0.5)
    assert chosen(decoder, step_of("####", [0.9, 0.5, 0.4, 0.6])) == [0, 1, 3]
    assert chosen(decoder, step_of("####", [0.1, 0.2, 0.4, 0.3])) == [2]
    assert chosen(decoder, step_of("####", [0.1, 0.2, 0.4, 0.3], least=2)) == [2, 3]


@pytest.mark.parametrize(("masked", "most"), [(4, 4), (6, 5), (7, 5), (8, 5), (9, 6), (16, 11), (28, 19), (40, 20)])
def test_the_cap_of_a_draft(masked: int, most: int) -> None:
    """Published: max(min(max(floor(0.7 n), 5), 20), least), the best of them."""
    assert min(masked, min(max(math.floor(0.7 * masked), 5), 20)) == most
    score = [1 - g / 100 for g in range(masked)]
    assert chosen(made("wino", wide_in_thres=0.1), step_of("#" * masked, score)) == list(range(most))
    assert len(chosen(made("wino"), step_of("#" * masked, score, least=30))) == min(masked, 30)


def verified(canvas: str, probability: list[float], drafted: int, **options: Any) -> list[int]:
    """Slots taken back of a canvas whose known slots are all verified, after a draft of that many."""
    step = step_of(canvas, [0.0] * len(canvas))
    known = ~step.view.masked
    candidates = torch.zeros_like(known)
    candidates[0, step.view.masked[0].nonzero().flatten()[:drafted]] = True
    found = (Verified(known, torch.tensor([probability])),)
    step = replace(step, candidates=candidates, score=candidates.float(), found=found)
    commits = made("wino", **options).choose(step)
    assert commits.revoked is not None and int(commits.slots.sum()) == drafted
    return commits.revoked[0].nonzero().flatten().tolist()


def test_what_fails_is_taken_back() -> None:
    probability = [0.95, 0.2, 0.9, 0.5, 0, 0, 0, 0]
    assert verified("....####", probability, 4, narrow_out_thres=0.9) == [1, 3]
    assert verified("....####", probability, 4, narrow_out_thres=0.3) == [1]


def test_fewer_are_taken_back_than_were_drafted() -> None:
    probability = [0.4, 0.2, 0.3, 0.2, 0, 0, 0, 0]
    assert verified("....####", probability, 3) == [1, 3]
    assert verified("....####", probability, 2) == [1], "ties go to the lower slot"
    assert verified("....####", probability, 1) == []


@given(wino_jobs(stops=True))
def test_what_is_emitted_stays(job: FakeJob) -> None:
    done = run_alone(job)
    canvas: dict[int, int] = {}
    text: list[int] = []
    for step in done.steps:
        assert len(step.revoked) < len(step.committed), "every step makes progress"
        assert {slot for slot, _ in step.committed}.isdisjoint(step.revoked)
        assert set(step.revoked) <= set(step.window) & set(canvas)
        canvas |= dict(step.committed)
        for slot in step.revoked:
            del canvas[slot]
        text += step.emitted
        assert text == [canvas.get(g) for g in range(len(text))]
    assert MASK not in done.output
    assert len(done.steps) <= job.canvas_length


@given(wino_jobs())
def test_the_whole_canvas_is_written(job: FakeJob) -> None:
    done = run_alone(job)
    assert len(done.output) == job.canvas_length
    assert done.steps[-1].masked == []


def test_something_is_taken_back_and_emission_waits_for_the_window() -> None:
    job = FakeJob([1, 2], 12, {"decoder": "wino", "policy": "full", "window": 6, "wide_in_thres": 0.1}, noise=4)
    done = run_alone(job)
    assert any(step.revoked for step in done.steps)
    for step in done.steps:
        assert len(step.emitted) in (0, 6)


@settings(max_examples=40)
@given(
    st.lists(st.tuples(st.one_of(wino_jobs(stops=True), jobs(stops=True)), st.integers(0, 9)), min_size=2, max_size=4)
)
def test_a_request_does_not_depend_on_its_mates(members: list[tuple[FakeJob, int]]) -> None:
    together = [job for job, _ in members]
    Batch(together).run([start for _, start in members])
    for job in together:
        assert run_alone(job).steps == job.steps


@given(wino_jobs(), st.integers(1, 6))
def test_a_preempted_request_emits_the_rest(job: FakeJob, steps: int) -> None:
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


@pytest.mark.parametrize("shift", [0, 1])
def test_where_a_slot_is_verified(shift: int) -> None:
    """In its shadow; of a shifted family in that on its left, the window's first slot in the text."""
    options = {"decoder": "wino", "policy": "full", "window": 4, "wide_in_thres": 1.0, "tokens_per_step": 3}
    batch = Batch([FakeJob([1, 2, 3], 8, options)], shift=shift)
    batch.add(0)
    batch.step([0])
    slot = batch.slot(0)
    step = batch.runner.open(torch.tensor([slot]), [slot])
    rows = step.rows
    n = len(rows.predicted_index[0])
    written = sorted(g for g, _ in batch.jobs[0].steps[0].committed)
    assert hook_of(step, ShadowHook).slot.tolist() == written
    assert rows.extra == [4]
    assert rows.positions[11:].tolist() == [3, 4, 5, 6]
    assert rows.input_ids[11:].tolist() == [MASK] * 4
    assert rows.input_ids[:11].tolist() == batch.runner.canvas.tokens[slot, :11].tolist()
    want = [11 + g if shift == 0 else (2 if g == 0 else 11 + g - 1) for g in written]
    assert rows.logits_rows[n:].tolist() == want


def test_no_shadows_while_there_is_nothing_to_verify() -> None:
    batch = Batch([FakeJob([1], 8, {"decoder": "wino", "policy": "full"}), FakeJob([1], 8, noise=1)])
    for i in range(2):
        batch.add(i)
    slots = [batch.slot(0), batch.slot(1)]
    assert batch.runner.open(torch.tensor(slots), slots).rows.extra == [0, 0]
    batch.step([0, 1])
    assert batch.runner.open(torch.tensor(slots), slots).rows.extra == [8, 0]


def test_it_goes_with_full_alone_and_needs_room() -> None:
    server = parse_server_options({})
    with pytest.raises(OptionError, match="with 'full' alone; name both"):
        resolve(server, {"decoder": "wino"})
    options = resolve(server, {"decoder": "wino", "policy": "full"})
    assert (options.window, extra_rows(options, 64), extra_rows(options, 8)) == (32, 32, 8)
    check_options_fit(options, 64, 96, False)
    with pytest.raises(OptionError, match="needs 32 positions"):
        check_options_fit(options, 64, 95, False)
