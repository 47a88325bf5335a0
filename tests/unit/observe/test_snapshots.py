"""Snapshots without an engine: what is asked for, what the worker appends to a report and the scheduler reads back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_d2cache.canvas.request import Request, SamplingSpec
from vllm_d2cache.canvas.states import CanvasStates
from vllm_d2cache.canvas.traits import FamilyTraits
from vllm_d2cache.observe.snapshots import append_snapshots, pieces, read_snapshots, take_snapshots
from vllm_d2cache.options.request import RequestOptions
from vllm_d2cache.options.types import OptionError
from vllm_d2cache.requests.asked import HOLE, snapshot_interval

MASK, STOP = 9, 8


def canvases(*lengths: int) -> CanvasStates:
    """A request in each slot, with a prompt of one token more than the slot's number and a canvas of that length."""
    states = CanvasStates(len(lengths), 40, torch.device("cpu"), FamilyTraits(mask_token_id=MASK))
    for slot, length in enumerate(lengths):
        sampling = SamplingSpec(stop_token_ids=(STOP,))
        request = Request(str(slot), slot + 1, length, RequestOptions(), sampling)
        states.add(slot, request, torch.zeros(slot + 1).int().numpy(), 0)
    return states


def commit(states: CanvasStates, slot: int, tokens: dict[int, int]) -> None:
    for place, token in tokens.items():
        states.tokens[slot, states.requests[slot].prompt_len + place] = token
        states.masked[slot, place] = False
        states.terminal[slot, place] = token == STOP


def test_a_snapshot_ends_at_the_canvas_or_behind_its_first_stop_token() -> None:
    states = canvases(3, 5, 5)
    commit(states, 0, {1: 4})
    commit(states, 1, {0: 2, 3: STOP, 4: 6})
    assert take_snapshots(states, [0, 1, 2]).tolist() == [
        [-1, 4, -1, -2, -2],
        [2, -1, -1, STOP, -2],
        [-1, -1, -1, -1, -1],
    ]
    # A decoder may take the stop token back.
    states.masked[1, 3], states.terminal[1, 3] = True, False
    assert take_snapshots(states, [1]).tolist() == [[2, -1, -1, -1, 6]]


@given(st.data())
def test_what_is_appended_is_read_back(data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.integers(1, 12), min_size=1, max_size=9))
    states = canvases(*lengths)
    want = []
    for slot, length in enumerate(lengths):
        canvas = data.draw(st.lists(st.integers(-1, 7), min_size=length, max_size=length))
        commit(states, slot, {place: token for place, token in enumerate(canvas) if token != HOLE})
        want.append(canvas)
    slots = data.draw(st.permutations(range(len(lengths))))
    watched = data.draw(st.sets(st.sampled_from(slots)))
    report = torch.arange(2 * len(slots)).view(-1, 2)
    whole = append_snapshots(report, states, slots, watched)
    assert torch.equal(whole[:, :2], report)
    numbers = whole[:, 2:].flatten().tolist()
    assert read_snapshots(numbers) == {row: want[slot] for row, slot in enumerate(slots) if slot in watched}
    # What those who do not watch pay: their share of the canvases, and nothing where nobody watches.
    most = 1 + len(watched) * (1 + max(lengths)) + len(slots) - 1
    assert len(numbers) <= (most if watched else 0)


@pytest.mark.parametrize(("value", "interval"), [(0, 0), (1, 1), (True, 1), (False, 0), (7, 7)])
def test_the_option_is_a_number_of_steps(value: Any, interval: int) -> None:
    assert snapshot_interval({"d2cache_snapshots": value}) == interval
    assert snapshot_interval({}) == snapshot_interval(None) == 0


@pytest.mark.parametrize("value", [-1, 1.0, "1", [1], None])
def test_other_values_are_refused(value: Any) -> None:
    with pytest.raises(OptionError, match=r"^d2cache_snapshots: must be an integer >= 0"):
        snapshot_interval({"d2cache_snapshots": value})


def test_pieces_are_runs_of_text_and_masks() -> None:
    def decode(ids: list[int]) -> str:
        return "".join("abc"[i] for i in ids)

    assert pieces([0, 1, HOLE, HOLE, 2], decode) == [{"text": "ab"}, {"masks": 2}, {"text": "c"}]
    assert pieces([HOLE], decode) == [{"masks": 1}]
    assert pieces([], decode) == []
