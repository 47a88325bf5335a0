"""The two stages of d2Cache by hand and by brute force, bounds on rows, and the refresh budget."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.unit import views
from tests.unit.batches import Batch, FakeJob, run_alone
from tests.unit.strategies import POLICIES as STRATEGIES
from tests.unit.strategies import jobs
from tests.unit.views import outcome_of
from vllm_d2cache.canvas.traits import FamilyTraits
from vllm_d2cache.canvas.view import CanvasView
from vllm_d2cache.mechanisms.base import Worker
from vllm_d2cache.mechanisms.importance import ReadsImportance
from vllm_d2cache.options.request import RequestOptions
from vllm_d2cache.options.server import ServerOptions
from vllm_d2cache.policies import POLICY_CLASSES
from vllm_d2cache.policies.base import StepOutcome, StepPlan
from vllm_d2cache.policies.d2cache import D2CachePolicy
from vllm_d2cache.policies.d2cache_options import MEMORIES
from vllm_d2cache.policies.full import FullPolicy
from vllm_d2cache.policies.registry import policy_class
from vllm_d2cache.requests.resolve import resolve

OWN = {"selection_sigma": 0, "current_k": 1000, "rollout_p": 0, "inflate_w": 0, "confidence_memory": 0}


def view_of(masked: list[str], prompt_len: list[int], *stops: Any, **options: Any) -> CanvasView:
    """As in views.py; options of the policy's own, one value for all rows or a list, go with the view."""
    own = {name: options.pop(name, value) for name, value in OWN.items()}
    view = views.view_of(masked, prompt_len, *stops, **options)
    view.__dict__["own"] = own
    return view


def policy(view: CanvasView, shift: int = 0, budget: int | None = None, slots: int = 64) -> D2CachePolicy:
    server = ServerOptions({}, refresh_budget=budget)
    made = D2CachePolicy(Worker(8, slots, torch.device("cpu"), FamilyTraits(370, shift), server))
    for slot, sigma in enumerate(view.options.sigma.tolist()):
        own = {name: x[slot] if isinstance(x, list) else x for name, x in view.__dict__["own"].items()}
        own["confidence_memory"] = MEMORIES[own["confidence_memory"]]
        made.start(slot, RequestOptions(sigma=sigma, policy_options=own))
    return made


def plan(view: CanvasView, outcome: StepOutcome, shift: int = 0) -> StepPlan:
    return policy(view, shift).next_plan(view, outcome)


def refreshed(view: CanvasView, outcome: StepOutcome, shift: int = 0) -> list[list[int]]:
    """Positions of each row's plan."""
    return [row.nonzero().flatten().tolist() for row in plan(view, outcome, shift).refresh]


# ---- stage 1: masked slots. One prompt position with importance 1 is stage 2's "at least one" and never a slot.


def masked_choice(masked: str, score: list[float], start: int = 0, shift: int = 0, **options: Any) -> list[int]:
    """Slots that stage 1 chooses, with the whole rollout mass on the first prompt position."""
    view = view_of([masked], [3], **options)
    importance = [[1.0] + [0.0] * (view.num_positions - 1)]
    got = refreshed(view, outcome_of(view, [score], importance, window_start=[start]), shift)
    assert got[0][0] == 0
    return [p - 3 + shift for p in got[0][1:]]


def test_the_best_of_the_whole_canvas() -> None:
    assert masked_choice("######", [0.1, 0.6, 0.2, 0.5, 0.3, 0.4], current_k=2) == [1, 3]
    assert masked_choice("#.##.#", [0.1, 0.9, 0.2, 0.5, 0.9, 0.4], current_k=2) == [3, 5]


def test_known_slots_and_more_than_there_are() -> None:
    assert masked_choice("..#..#", [0.1] * 6, current_k=32) == [2, 5]


def test_ties_go_to_the_lower_slot() -> None:
    assert masked_choice("." + "#" * 39, [0.5] * 40, current_k=3) == [1, 2, 3]


def test_the_search_stays_in_the_window_of_the_kth_masked_slot() -> None:
    score = [0.1, 0.1, 0.2, 0.2, 0.9, 0.9, 0.95, 0.95]
    # Two are left in the first window of four: with k = 2 the search ends there, with k = 3 it takes in the next.
    assert masked_choice("..######", score, window=4, current_k=2) == [2, 3]
    assert masked_choice("..######", score, window=4, current_k=3) == [2, 3, 6]


def test_the_current_window_goes_first_however_low_its_scores() -> None:
    score = [0.01, 0.02, 0.9, 0.8]
    assert masked_choice("####", score, window=2, current_k=3) == [0, 1, 2]
    assert masked_choice("####", score, window=2, current_k=1) == [1]


def test_the_search_begins_at_the_current_window_and_looks_ahead_when_it_is_full() -> None:
    score = [0.9, 0.9, 0.1, 0.2, 0.8, 0.7, 0.9, 0.9]
    # The window at 0 was filled in this step: no bonus applies, and the k-th masked slot lies in the next window.
    assert masked_choice("..######", score, start=0, window=2, current_k=2) == [2, 3]
    assert masked_choice("..######", score, start=0, window=2, current_k=3) == [3, 4, 5]


def test_slots_behind_a_stop_token_are_not_chosen() -> None:
    view = view_of(["##.##"], [3], {0: [2]}, current_k=32)
    importance = [[1.0] + [0.0] * 7]
    assert refreshed(view, outcome_of(view, importance=importance))[0] == [0, 3, 4]


def test_density_pulls_towards_known_text() -> None:
    score = [0.5] * 30
    masked = "#" * 20 + "." + "#" * 9
    assert masked_choice(masked, score, current_k=4, selection_sigma=2.0) == [0, 1, 19, 21]
    assert masked_choice(masked, score, current_k=4, selection_sigma=0.0) == [0, 1, 2, 3]


@pytest.mark.parametrize("widths", [[2.0, 2.0], [2.0, 0.0]], ids=["the prior's own", "apart"])
def test_density_is_of_the_width_of_selection_whatever_the_prior_has(widths: list[float]) -> None:
    masked = "#" * 20 + "." + "#" * 9
    view = view_of([masked] * 2, [3, 3], current_k=4, selection_sigma=widths, sigma=2.0)
    importance = [[1.0] + [0.0] * (view.num_positions - 1)] * 2
    got = refreshed(view, outcome_of(view, [[0.5] * 30] * 2, importance))
    want = {2.0: [0, 1, 19, 21], 0.0: [0, 1, 2, 3]}
    assert [[p - 3 for p in line[1:]] for line in got] == [want[width] for width in widths]


def test_each_row_searches_by_itself() -> None:
    view = view_of(["####", "######"], [3, 5], current_k=[1.0, 2.0], window=[2.0, 6.0])
    score = [[0.1, 0.2, 0.9, 0.9, 9.0, 9.0], [0.1, 0.6, 0.2, 0.5, 0.3, 0.4]]
    importance = [[1.0] + [0.0] * 10] * 2
    assert refreshed(view, outcome_of(view, score, importance)) == [[0, 4], [0, 6, 8]]


# ---- the confidence memory


@pytest.mark.parametrize(("latest", "want"), [(0, 0), (1, 2)])
def test_memory_is_of_the_first_step_or_of_the_latest(latest: float, want: int) -> None:
    view = view_of(["###"], [3], current_k=1, confidence_memory=latest)
    made = policy(view)
    importance = [[1.0] + [0.0] * 5]
    made.first_plan(view)
    made.next_plan(view, outcome_of(view, [[0.9, 0.2, 0.1]], importance))
    second = outcome_of(view, [[0.1, 0.2, 0.9]], importance, first=False)
    got = made.next_plan(view, second).refresh[0].nonzero().flatten().tolist()
    assert got == [0, 3 + want]


def test_latest_memory_keeps_what_this_step_did_not_predict() -> None:
    view = view_of(["###"], [3], current_k=1, confidence_memory=1)
    made = policy(view)
    importance = [[1.0] + [0.0] * 5]
    made.next_plan(view, outcome_of(view, [[0.5, 0.9, 0.1]], importance))
    second = outcome_of(view, [[0.6, 0.0, 0.7]], importance, first=False)
    second.predicted[0, 1] = False
    assert made.next_plan(view, second).refresh[0, 4], "slot 1 still counts 0.9"


def test_latest_memory_observes_what_it_refreshes() -> None:
    for latest in (0, 1):
        view = view_of(["####"], [3], current_k=2, confidence_memory=latest)
        importance = [[1.0] + [0.0] * 6]
        got = plan(view, outcome_of(view, [[0.1, 0.9, 0.8, 0.2]], importance))
        if latest:
            assert got.observe is not None
            assert got.observe[0].tolist() == [False, True, True, False]
        else:
            assert got.observe is None


# ---- stage 2: the rest


def rest(importance: list[float], p: float, committed: tuple[int, ...] = ()) -> list[int]:
    """Positions of a request without masked slots that stage 2 chooses (canvas: the last four)."""
    view = view_of(["...."], [len(importance) - 4], rollout_p=p)
    return refreshed(view, outcome_of(view, importance=[importance], committed=[list(committed)]))[0]


def test_the_longest_head_with_at_most_p() -> None:
    importance = [1.0, 8.0, 2.0, 1.0, 1.0, 1.0, 1.0, 1.0]  # of 16
    assert rest(importance, 0.5) == [1]
    assert rest(importance, 0.624) == [1]
    assert rest(importance, 0.625) == [1, 2]
    assert rest(importance, 0.75) == [0, 1, 2, 3]


def test_at_least_one_and_at_most_all() -> None:
    importance = [1.0, 8.0, 2.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    assert rest(importance, 0.0) == [1]
    assert rest(importance, 0.1) == [1]
    assert rest(importance, 1.0) == list(range(8))


def test_equal_importance_goes_to_the_lower_position() -> None:
    assert rest([1.0] * 8, 0.375) == [0, 1, 2]
    assert rest([1.0] * 48, 0.25) == list(range(12))


def test_commits_are_always_refreshed_and_do_not_count() -> None:
    # Without slot 1 (position 5) the candidates hold 16.
    importance = [1.0, 8.0, 2.0, 1.0, 1.0, 100.0, 1.0, 2.0]
    assert rest(importance, 0.5, (1,)) == [1, 5]


def test_stage_two_takes_prompt_known_and_unselected_masked_positions() -> None:
    view = view_of(["##.#"], [3], current_k=1, rollout_p=1.0)
    assert refreshed(view, outcome_of(view))[0] == list(range(7))


def test_positions_past_the_text_are_never_refreshed() -> None:
    view = view_of(["#.", "######"], [2, 9], rollout_p=1.0, inflate_w=50)
    got = refreshed(view, outcome_of(view, importance=[[1.0] * 4 + [0.0] * 11, [1.0] * 15]))
    assert got == [list(range(4)), list(range(15))]


def head_by_loop(importance: list[int], p: float) -> list[int]:
    total = sum(importance)
    order = sorted(range(len(importance)), key=lambda j: (-importance[j], j))
    head, mass = [], 0
    for j in order:
        mass += importance[j]
        if mass > p * total and head:
            break
        head.append(j)
        if mass > p * total:
            break
    return sorted(head)


@given(st.lists(st.integers(1, 9), min_size=5, max_size=30), st.sampled_from([0.0, 0.125, 0.25, 0.5, 0.75, 1.0]))
def test_heads_by_brute_force(importance: list[int], p: float) -> None:
    # A total that is a power of two makes the shares exact.
    importance.append(1)
    while (total := sum(importance)) & (total - 1):
        importance[-1] += 1
    assert rest([float(x) for x in importance], p) == head_by_loop(importance, p)


# ---- shifted families, inflation


def test_shifted_slots_live_one_to_the_left_and_commits_at_their_own_place() -> None:
    assert masked_choice("####", [0.1, 0.9, 0.2, 0.8], shift=1, current_k=2) == [1, 3]
    view = view_of([".###"], [3], current_k=1)
    importance = [[1.0] + [0.0] * 6]
    got = refreshed(view, outcome_of(view, [[0, 0.1, 0.9, 0.2]], importance, committed=[[0]]), 1)
    assert got[0] == [0, 3, 4]  # stage 2, the commit at slot 0, slot 2 read from the position of slot 1


@pytest.mark.parametrize(("masked", "want"), [("####", True), (".###", False)])
def test_the_last_prompt_position_serves_slot_zero_alone(masked: str, want: bool) -> None:
    view = view_of([masked], [3], current_k=32, rollout_p=0.9)
    importance = [[0.1, 0.1, 99.0, 0.1, 0.1, 0.1, 0.1]]
    assert (2 in refreshed(view, outcome_of(view, importance=importance), 1)[0]) == want


def inflate_by_loop(members: list[int], width: int) -> list[int]:
    out = set(members)
    if width > 0:
        for a, z in pairwise(members):
            if z - a <= width:
                out |= set(range(a, z))
    return sorted(out)


@given(st.lists(st.integers(0, 39), min_size=1, max_size=12, unique=True), st.integers(0, 12))
def test_inflation_by_brute_force(members: list[int], width: int) -> None:
    members.sort()
    view = view_of(["." * 40], [1], inflate_w=width)
    importance = [[1.0] + [0.0] * 40]  # stage 2 takes the prompt position, which neighbours slot 0
    got = refreshed(view, outcome_of(view, importance=importance, committed=[members]))[0]
    assert got == inflate_by_loop([0, *(m + 1 for m in members)], width)


# ---- max_rows


@given(jobs())
def test_max_rows_bounds_every_later_step(job: FakeJob) -> None:
    batch = Batch([job])
    batch.add(0)
    bound = batch.runner.canvas.requests[batch.slot(0)].row_budget
    assert 1 <= bound <= job.total
    while not job.done:
        batch.step([0])
    assert max((len(step.refreshed) for step in job.steps[1:]), default=0) <= bound


@given(st.integers(1, 60), st.integers(1, 60), st.sampled_from([0.0, 0.1, 0.3, 1 / 3, 0.7, 0.999999999, 1.0]))
def test_max_rows_holds_for_level_importance(prompt: int, canvas: int, p: float) -> None:
    """Level importance is the worst case of a head: its length is all of p times the candidates."""
    view = view_of(["#" * (canvas - 1) + "."], [prompt], current_k=1, rollout_p=p)
    options = resolve(ServerOptions({}), {"current_k": 1, "rollout_p": p})
    bound = D2CachePolicy.max_rows(options, prompt, canvas, None)
    made = policy(view, slots=200)
    got = made.next_plan(view, outcome_of(view, committed=[[canvas - 1]]))
    assert int(got.refresh.sum()) <= bound <= prompt + canvas


def test_published_default_bound() -> None:
    """32 masked, one commit, a tenth of the text."""
    assert D2CachePolicy.max_rows(resolve(ServerOptions({}), {}), 767, 257, None) == 32 + 1 + 103
    assert D2CachePolicy.max_rows(resolve(ServerOptions({}), {}), 767, 257, 64) == 64
    assert FullPolicy.max_rows(resolve(ServerOptions({}), {}), 767, 257, 64) == 1024


def test_a_preset_is_the_policy_with_other_defaults() -> None:
    """Published 32, light 8; what a request says wins, and texts in blocks have no preset."""
    light = resolve(ServerOptions({}), {"policy": "d2cache_light"})
    assert light.value("current_k") == 8
    assert light.value("rollout_p") == resolve(ServerOptions({}), {}).value("rollout_p")
    assert D2CachePolicy.max_rows(light, 767, 257, None) == 8 + 1 + 103
    assert resolve(ServerOptions({}), {"policy": "d2cache_light", "current_k": 3}).value("current_k") == 3
    assert not policy_class("d2cache_light", 32).keeps_blocks


def test_policies_are_found_by_name() -> None:
    assert set(POLICY_CLASSES) == set(STRATEGIES), "every policy takes part in the property tests"
    assert [type(use) for use in POLICY_CLASSES["d2cache"].uses] == [ReadsImportance]
    assert POLICY_CLASSES["full"].uses == ()


# ---- the refresh budget


@given(jobs("d2cache"), st.integers(1, 12))
def test_any_budget_is_kept_and_the_request_finishes(job: FakeJob, budget: int) -> None:
    done = run_alone(job, {"refresh_budget": budget})
    assert all(len(step.refreshed) <= budget for step in done.steps[1:])
    assert sorted(slot for step in done.steps for slot, _ in step.committed) == list(range(job.canvas_length))


@given(jobs("d2cache"))
def test_a_budget_that_always_suffices_changes_nothing(job: FakeJob) -> None:
    assert run_alone(job, {"refresh_budget": job.total}).steps == run_alone(job).steps


LEVEL = {"rollout_p": 0.5, "current_k": 8}


@pytest.mark.parametrize("budget", [1, 2, 3, 8, 20])
@pytest.mark.parametrize("options", [LEVEL, {"rollout_p": 1.0, "current_k": 1}, {**LEVEL, "threshold": 0.1}])
def test_what_waits_never_keeps_masked_slots_out(options: dict[str, Any], budget: int) -> None:
    """Stage 2 chooses more in every step than the budget holds; decoding goes on all the same."""
    job = run_alone(FakeJob([1] * 40, 20, options), {"refresh_budget": budget}, max_steps=45)
    assert len(job.output) == 20


@pytest.mark.parametrize("budget", [1, 2, 8])
@pytest.mark.parametrize("options", [LEVEL, {**LEVEL, "tokens_per_step": 4}])
def test_commits_are_refreshed_before_the_next_ones_are_made(options: dict[str, Any], budget: int) -> None:
    """A committed token's keys are those of a mask until its row is computed."""
    job = run_alone(FakeJob([1] * 40, 20, options), {"refresh_budget": budget})
    owed: set[int] = set()
    for step in job.steps:
        owed -= set(step.refreshed)
        assert not owed or not step.committed
        owed |= {40 + slot for slot, _ in step.committed}


@pytest.mark.parametrize("budget", [4, 8, 16])
def test_context_that_was_put_off_is_refreshed_in_the_end(budget: int) -> None:
    """Positions chosen once, by importance, in a step that had no room for them."""
    view = view_of(["#" * 20], [30], current_k=12, rollout_p=0.5)
    made = policy(view, budget=budget)
    made.first_plan(view)
    peak = [[50.0] * 10 + [1.0] * 40]
    start = made.next_plan(view, outcome_of(view, importance=peak)).refresh[0]
    seen = set(start.nonzero().flatten().tolist())
    assert not set(range(5)) <= seen
    for _ in range(12):
        later = [[1.0] * 40 + [50.0] * 10]  # from now on other positions are chosen
        got = made.next_plan(view, outcome_of(view, importance=later, first=False)).refresh[0]
        assert int(got.sum()) <= budget
        assert got[30:].any(), "a masked slot in every step"
        seen |= set(got.nonzero().flatten().tolist())
    assert set(range(5)) <= seen


@given(jobs("d2cache"), jobs("full"), jobs("d2cache"))
def test_a_budget_does_not_couple_requests(a: FakeJob, b: FakeJob, c: FakeJob) -> None:
    together = [a, b, c]
    Batch(together, {"refresh_budget": 5}).run([0, 1, 3])
    for job in together:
        assert run_alone(job, {"refresh_budget": 5}).steps == job.steps
    assert all(step.full for step in b.steps), "the full policy has no budget"
