"""prefix and dual: the refresh sets of the published traces, whatever the family, and by hand."""

from __future__ import annotations

import pytest

from tests.reference.oracle import load_case
from tests.unit.replay import one_by_one, replay
from vllm_d2cache.options.request import RequestOptions
from vllm_d2cache.options.server import ServerOptions
from vllm_d2cache.policies import POLICY_CLASSES
from vllm_d2cache.requests.resolve import resolve

TRACES = [("llada.prefix_semi8", 0), ("llada.dual_semi8", 0), ("llada.dual_semi8_thr", 0), ("dream.dual_semi8", 1)]


@pytest.mark.parametrize(("name", "shift"), TRACES)
def test_refresh_sets_of_the_traces(name: str, shift: int) -> None:
    """The traces' own commits, so that no network is needed (test_oracle.py and the engine tests decode them)."""
    case = load_case(name)
    everything = list(range(len(case.prompt) + case.canvas_length))
    options = {"policy": case.options["policy"], "window": case.options["window"]}
    got = replay(options, len(case.prompt), case.canvas_length, [dict(c) for _, c in case.steps], shift)
    assert [step.refreshed for step in got] == [everything if r is None else r for r, _ in case.steps]


P, G = 3, 8
ALL = list(range(P + G))


@pytest.mark.parametrize(
    ("policy", "shift", "first", "second"),
    [
        ("prefix", 0, list(range(3, 11)), list(range(7, 11))),
        ("prefix", 1, list(range(2, 10)), list(range(6, 10))),
        ("dual", 0, [3, 4, 5, 6], [7, 8, 9, 10]),
        ("dual", 1, [2, 3, 4, 5], [6, 7, 8, 9]),
    ],
)
def test_a_window_begins_with_everything(policy: str, shift: int, first: list[int], second: list[int]) -> None:
    moves = one_by_one(1, 0, 3, 2, 7, 5, 4, 6)
    got = [s.refreshed for s in replay({"policy": policy, "window": 4}, P, G, moves, shift)]
    assert got == [ALL, first, first, first, ALL, second, second, second]


def test_a_window_completed_at_once_is_followed_by_everything() -> None:
    moves = [{0: 7, 1: 7}, {2: 7}, {3: 7}, {4: 7, 5: 7}, {6: 7}]
    got = [s.refreshed for s in replay({"policy": "dual", "window": 2}, P, G, moves)]
    assert got == [ALL, ALL, [5, 6], ALL, ALL]


def test_a_last_window_may_be_short() -> None:
    got = [s.refreshed for s in replay({"policy": "dual", "window": 3}, P, 4, one_by_one(0, 1, 2, 3))]
    assert got == [list(range(7)), [3, 4, 5], [3, 4, 5], list(range(7))]
    got = [s.refreshed for s in replay({"policy": "dual", "window": 3}, P, 5, one_by_one(0, 1, 2, 4, 3))]
    assert got[-1] == [6, 7]


def test_published_defaults_and_bound() -> None:
    for policy in ("prefix", "dual"):
        options = resolve(ServerOptions({}), {"policy": policy})
        assert (options.window, options.sigma) == (32, 0.0)
        assert resolve(ServerOptions({"window": 8, "sigma": 3.0}), {"policy": policy}).window == 8
        assert POLICY_CLASSES[policy].max_rows(RequestOptions(), 100, 28, 5) == 128
