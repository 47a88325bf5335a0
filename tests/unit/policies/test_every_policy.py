"""What holds for every cache policy, whatever its options and its company."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.batches import Batch, run_alone
from tests.unit.strategies import POLICIES, jobs
from vllm_d2cache.mechanisms.hidden_keys import HidesKeys
from vllm_d2cache.options.sampling import SamplingSpec
from vllm_d2cache.options.server import ServerOptions
from vllm_d2cache.options.types import OptionError
from vllm_d2cache.policies import POLICY_CLASSES
from vllm_d2cache.requests.resolve import parse_request_options, resolve

# Options with which a policy refreshes everything in every step. Windows of one slot: each step begins one.
EVERYTHING: dict[str, dict[str, Any]] = {
    "d2cache": {"current_k": 100, "rollout_p": 1.0},
    "d2cache_light": {"current_k": 100, "rollout_p": 1.0},
    "full": {},
    "block": {},
    "prefix": {"window": 1},
    "dual": {"window": 1},
    "dkv": {"dkv_variant": "decode", "cache_steps": 1},
    "vicinity": {"prefix_look": 100, "after_look": 100},
    "entropy": {"entropy_tau": 0.0, "confidence_top_p": 1.0},
    "window_diffusion": {"outer_window": 100, "inner_window": 100, "phase_steps": 1},
    "dllm_cache": {"kp": 1, "kr": 1},
    "spa": {"refresh_steps": 1},
    "sparse_dllm": {"keep_ratio": 0, "window": 1},
    "streaming": {"suffix_window": 100, "window": 1},
    "es": {"prompt_update_freq": 1, "window": 0},
    "elastic": {"elastic_beta": 100, "elastic_gamma": 1.0},
}


def hides_keys(policy: str) -> bool:
    return any(isinstance(use, HidesKeys) for use in POLICY_CLASSES[policy].uses)


def test_every_policy_is_here() -> None:
    assert set(EVERYTHING) == set(POLICIES) == set(POLICY_CLASSES)


@pytest.mark.parametrize("policy", EVERYTHING)
@settings(max_examples=30)
@given(data=st.data())
def test_everything_refreshed_is_the_full_policy(policy: str, data: st.DataObject) -> None:
    job = data.draw(jobs(policy))
    # Without a filter no distribution has an entropy of zero.
    job = replace(job, sampling=SamplingSpec(job.sampling.temperature, seed=job.sampling.seed))
    # Policies differ in their defaults for decoding.
    decoding = {n: v for n, v in job.options.items() if n not in POLICIES[policy] and n != "policy"}
    decoding = {"window": 4, "sigma": 0.0, **decoding}
    decoding |= {n: v for n, v in EVERYTHING[policy].items() if n not in POLICIES[policy]}
    own = {n: v for n, v in EVERYTHING[policy].items() if n in POLICIES[policy]}
    got = run_alone(replace(job, options={**decoding, **own, "policy": policy}))
    want = run_alone(replace(job, options={**decoding, "policy": "full"}))
    assert [s.refreshed for s in got.steps] == [s.refreshed for s in want.steps]
    assert [s.committed for s in got.steps] == [s.committed for s in want.steps]


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("policy", POLICIES)
@settings(max_examples=15)
@given(data=st.data())
def test_a_request_does_not_depend_on_its_mates(policy: str, shift: int, data: st.DataObject) -> None:
    """Mates of the same policy and of others, joining at any time, longer and shorter."""
    mates = st.lists(st.tuples(st.one_of(jobs(policy, stops=True), jobs(stops=True)), st.integers(0, 9)), max_size=3)
    job = data.draw(jobs(policy, stops=True))
    members = [(job, data.draw(st.integers(0, 5))), *data.draw(mates)]
    Batch([j for j, _ in members], shift=shift).run([start for _, start in members])
    for member, _ in members:
        alone = run_alone(member, shift=shift)
        assert alone.steps == member.steps
        assert alone.output == member.output


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("policy", POLICIES)
@settings(max_examples=20)
@given(data=st.data())
def test_every_step_commits_and_keeps_to_the_rows_reserved(policy: str, shift: int, data: st.DataObject) -> None:
    job = data.draw(jobs(policy))
    batch = Batch([job], shift=shift)
    batch.add(0)
    bound = batch.runner.canvas.requests[batch.slot(0)].row_budget
    while not job.done:
        batch.step([0])
        assert job.steps[-1].committed
    assert sorted(slot for step in job.steps for slot, _ in step.committed) == list(range(job.canvas_length))
    assert max((len(step.refreshed) for step in job.steps[1:]), default=0) <= bound <= job.total


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("policy", POLICIES)
@settings(max_examples=15)
@given(data=st.data())
def test_rows_attend_to_what_has_been_computed(policy: str, shift: int, data: st.DataObject) -> None:
    """A key that is seen has been computed, with the token that stands there now or the one before."""
    job = run_alone(data.draw(jobs(policy)), shift=shift)
    computed: set[int] = set()
    for step in job.steps:
        computed |= set(step.refreshed)
        seen = range(job.total) if step.keys is None else step.keys
        assert set(seen) <= computed
        assert set(step.refreshed) <= set(seen)
        assert step.keys is None or hides_keys(policy)
    owed: set[int] = set()
    for step in job.steps:
        owed = (owed - set(step.refreshed)) | {len(job.prompt) + slot for slot, _ in step.committed}
    if policy not in ("prefix", "dual", "vicinity", "streaming"):
        # These refresh a shifted window's last slot with the next window.
        assert len(owed) <= max(len(step.committed) for step in job.steps)


@pytest.mark.parametrize("policy", POLICIES)
@settings(max_examples=10)
@given(data=st.data())
def test_a_reused_slot_remembers_nothing(policy: str, data: st.DataObject) -> None:
    before, job = data.draw(jobs(policy)), data.draw(jobs(policy))
    want = run_alone(job)
    batch = Batch([before.fresh(), job.fresh()])
    batch.slot = lambda i: 1  # type: ignore[method-assign]
    batch.add(0)
    for _ in range(4):
        if not batch.jobs[0].done:
            batch.step([0])
    batch.runner.remove(1)
    batch.add(1)
    while not batch.jobs[1].done:
        batch.step([1])
    assert batch.jobs[1].steps == want.steps


def resolved(request: dict[str, Any], server: dict[str, Any] | None = None) -> Any:
    prefixed = {f"d2cache_{name}": value for name, value in request.items()}
    return resolve(ServerOptions(server or {}), parse_request_options(prefixed))


@pytest.mark.parametrize("policy", POLICIES)
def test_options_of_another_policy_are_refused_by_name(policy: str) -> None:
    for other, cls in POLICY_CLASSES.items():
        for name, spec in cls.options.items():
            value = getattr(spec, "default", None) or getattr(spec, "values", [None])[0] or getattr(spec, "high", 1)
            value = 1 if value == float("inf") else value
            if name in POLICY_CLASSES[policy].options:
                assert resolved({"policy": policy, name: value}).value(name) == value
                continue
            if policy == "full":  # the yardstick: the rest of a request stays as it is
                assert resolved({"policy": policy, name: value}).policy == policy
                continue
            with pytest.raises(
                OptionError, match=f"^d2cache_{name}: an option of d2cache_policy .*'{other}'.*{policy}"
            ):
                resolved({"policy": policy, name: value})
            # The operator sets it for the requests of that policy.
            assert resolved({"policy": policy}, {name: value}).policy == policy
            assert resolved({"policy": other}, {name: value}).value(name) == value


def test_the_servers_policy_counts_where_the_request_names_none() -> None:
    assert resolved({"current_k": 4}).value("current_k") == 4
    with pytest.raises(OptionError, match="d2cache_current_k"):
        resolved({"current_k": 4}, {"policy": "dual"})


def test_a_policys_defaults_yield_to_what_is_set() -> None:
    assert resolved({"policy": "dual"}).window == 32
    assert resolved({"policy": "dual"}, {"window": 8}).window == 8
    assert resolved({"policy": "dual", "window": 4}, {"window": 8}).window == 4
    assert resolved({}, {"policy": "dual"}).sigma == 0.0
