"""How many tokens each step commits when a number of steps is given."""

from __future__ import annotations

import pytest
import torch

from tests.reference.blocks import quota
from tests.unit.batches import MASK, Batch, FakeJob, run_alone
from tests.unit.views import at_window_step, view_of
from vllm_d2cache.canvas.traits import FamilyTraits
from vllm_d2cache.decoders.schedule import least_commits


def llada(tokens: int, steps: int) -> list[int]:
    """What LLaDA's code commits in each step of a block: the remainder goes to the first steps."""
    base, more = divmod(tokens, steps)
    return [n for n in (base + (i < more) for i in range(steps)) if n]


def dream(tokens: int, steps: int) -> list[int]:
    """What Dream's code commits, but for steps that commit nothing: here they commit one."""
    times = torch.linspace(1, 1e-3, steps + 1)
    counts, left = [], tokens
    for i in range(steps):
        share = int(left * (1 - times[i + 1] / times[i])) if i < steps - 1 else left
        count = min(left, max(1, share))
        if count:
            counts.append(count)
        left -= count
    return counts


def committed(job: FakeJob, schedule: str = "even") -> list[int]:
    batch = Batch([job])
    batch.runner.canvas.traits = FamilyTraits(MASK, 0, schedule)
    batch.run()
    return [len(step.committed) for step in job.steps]


CASES = [(20, 20), (20, 5), (20, 7), (19, 8), (20, 1), (7, 30)]


@pytest.mark.parametrize(("tokens", "steps"), CASES)
def test_one_window_as_published(tokens: int, steps: int) -> None:
    assert committed(FakeJob([1], tokens, {"steps": steps, "policy": "full"})) == llada(tokens, steps)
    assert committed(FakeJob([1], tokens, {"steps": steps, "policy": "full"}), "timestep") == dream(tokens, steps)


@pytest.mark.parametrize("schedule", ["even", "timestep"])
def test_windows_share_the_steps(schedule: str) -> None:
    published = {"even": llada, "timestep": dream}[schedule]
    job = FakeJob([1], 20, {"steps": 9, "window": 8})  # windows of 8, 8 and 4
    assert committed(job, schedule) == published(8, 3) * 2 + published(4, 3)


def test_a_rule_that_commits_more_leaves_less_for_later_steps() -> None:
    plain = committed(FakeJob([1], 20, {"steps": 10, "window": 0, "sigma": 0}))
    quick = committed(FakeJob([1], 20, {"steps": 10, "threshold": 0.6, "window": 0}))
    assert sum(plain) == sum(quick) == 20
    assert len(quick) < len(plain) == 10


def test_both_schedules_by_hand() -> None:
    view = view_of(["########", "####....", "##......"], [1, 2, 3], steps=4.0)
    assert least_commits(at_window_step(view, [0, 1, 3]), "even").tolist() == [2, 2, 2]
    # Shares of the masks, about 1/4, 1/3, and all in the last step.
    assert least_commits(at_window_step(view, [0, 1, 3]), "timestep").tolist() == [1, 1, 2]


def test_requests_without_steps_keep_their_count() -> None:
    view = view_of(["########", "########"], [1, 1], steps=[0.0, 2.0], tokens_per_step=[3.0, 1.0])
    assert least_commits(at_window_step(view, [0, 0]), "even").tolist() == [3, 4]


def test_masks_behind_a_stop_token_keep_the_pace() -> None:
    view = view_of(["####.###"], [1], stops={0: [4]}, steps=4.0)
    assert least_commits(at_window_step(view, [1]), "even").tolist() == [3]


def test_a_new_tenant_starts_its_windows_anew() -> None:
    batch = Batch([FakeJob([1], 9, {"steps": 3}), FakeJob([1], 9, {"steps": 3}, noise=3)])
    batch.slot = lambda i: 1  # type: ignore[method-assign]
    batch.add(0)
    batch.step([0])
    batch.runner.remove(1)
    batch.add(1)
    while not batch.jobs[1].done:
        batch.step([1])
    assert batch.jobs[1].steps == run_alone(batch.jobs[1]).steps


@pytest.mark.parametrize(("steps", "wanted"), [(3, [3, 3, 2]), (5, [2, 2, 2, 1, 1]), (4, [2] * 4), (30, [1] * 8)])
def test_in_blocks_a_step_commits_its_share_of_the_window(steps: int, wanted: list[int]) -> None:
    """Whatever is left in it: a prompt that ends inside a block leaves fewer masks, and takes nothing off a share."""
    view = view_of(["########"] * len(wanted), [1] * len(wanted), steps=float(steps), window=8.0)
    view = at_window_step(view, list(range(len(wanted))))
    assert least_commits(view, "window").tolist() == wanted == [quota(8, steps, k) for k in range(len(wanted))]
    short = view_of(["....####"], [1], steps=float(steps), window=8.0)
    assert least_commits(at_window_step(short, [0]), "window").tolist() == wanted[:1]
