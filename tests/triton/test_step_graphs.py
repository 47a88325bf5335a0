"""Graphs of refresh steps, recorded by the emulator: replayed on other batches they give what eager steps give."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch

from tests.graph_emulator import Emulator
from tests.triton.loop import PAGE, Loop
from vllm_d2cache.graphs.graph_check import CacheSize, GraphError, check_graphs
from vllm_d2cache.graphs.step_graphs import GraphSize, StepBuffers, StepGraphs, graph_sizes
from vllm_d2cache.mechanisms import importance
from vllm_d2cache.mechanisms.importance import ReadsImportance
from vllm_d2cache.ops import dispatch
from vllm_d2cache.ops.paged_attention import PagedLayout

pytestmark = pytest.mark.skipif("torch.cuda.is_available()", reason="a GPU records graphs itself (test_cuda_graphs.py)")

TEXTS = [(44, 12), (20, 4), (75, 5)]
OPTIONS: list[dict[str, Any]] = [
    {"current_k": 4, "rollout_p": 0.05},
    {"policy": "full"},
    {"current_k": 2, "rollout_p": 0.1, "tokens_per_step": 2},
]
SIZES = [GraphSize(16, 1), GraphSize(32, 2), GraphSize(64, 4)]


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> Iterator[None]:
    monkeypatch.setitem(dispatch._chosen, device.type, "triton")
    return


def with_graphs(loop: Loop, sizes: list[GraphSize] = SIZES, block: int = 0) -> tuple[Loop, Emulator]:
    emulator = Emulator()
    buffers = StepBuffers(sizes[-1], 96, PAGE, loop.device, block)
    loop.graphs = StepGraphs(sizes, buffers, loop.forward, emulator.record)
    loop.graphs.capture()
    return loop, emulator


def test_replays_of_other_batches_decide_what_eager_steps_decide(device: torch.device) -> None:
    eager, (graphed, emulator) = Loop(device, OPTIONS, texts=TEXTS), with_graphs(Loop(device, OPTIONS, texts=TEXTS))
    assert emulator.graphs == len(SIZES)
    assert emulator.launches >= 8, "two layers, each pages, attention, maps and rollout"
    for loop in (eager, graphed):
        loop.step(padded=False)
    # The same graphs serve different companies, in any order of rows.
    for slots in ([0], [0, 1, 2], [2, 0], [2], [1, 2], [1]):
        want, got = eager.step(padded=False, slots=slots), graphed.step(slots=slots)
        assert torch.equal(got.committed, want.committed), slots
        assert torch.equal(got.tokens, want.tokens), slots
        assert torch.equal(graphed.steps.canvas.refresh, eager.steps.canvas.refresh), slots
    assert graphed.graph_steps == 6
    for got_cache, want_cache in zip(graphed.caches, eager.caches, strict=True):
        torch.testing.assert_close(got_cache, want_cache, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("free_rows", [0, 20])
def test_a_graph_of_counted_rows_decides_the_same(device: torch.device, free_rows: int) -> None:
    """Where padding is not free, a step waits for its numbers of rows; what they are makes no difference."""
    exact, (graphed, _) = Loop(device, OPTIONS, texts=TEXTS), with_graphs(Loop(device, OPTIONS, texts=TEXTS))
    graphed.steps.forms.free_rows = free_rows
    for loop in (exact, graphed):
        loop.step(padded=False)
    assert graphed.graph_steps == 0, "first steps are eager"
    padded = []
    for slots in ([0], [0, 1, 2], [2, 0], [2], [1, 2], [1]):
        padded.append(graphed.steps.forms.padded_graph(slots) is not None)
        want, got = exact.step(padded=False, slots=slots), graphed.step(padded=False, slots=slots)
        assert torch.equal(got.committed, want.committed), slots
        assert torch.equal(got.tokens, want.tokens), slots
        assert torch.equal(graphed.steps.canvas.refresh, exact.steps.canvas.refresh), slots
    assert graphed.graph_steps == 6
    assert any(padded) is (free_rows > 0)
    assert not all(padded)
    for got_cache, want_cache in zip(graphed.caches, exact.caches, strict=True):
        torch.testing.assert_close(got_cache, want_cache, rtol=1e-5, atol=1e-6)


BLOCK = 8
IN_BLOCKS: list[dict[str, Any]] = [
    {"policy": "block", "threshold": 0.4},
    {"policy": "full", "tokens_per_step": 3},
    {"policy": "d2cache", "current_k": 2, "inflate_w": 0},
    {"policy": "d2cache", "current_k": 3, "decoder": "edit", "threshold": 0.5, "editing_threshold": 0.3},
]


def in_blocks(device: torch.device) -> Loop:
    return Loop(device, IN_BLOCKS, texts=[(44, 20), (20, 28), (75, 21), (5, 27)], block=BLOCK)


def test_blocks_are_entered_written_and_stored_alike_in_all_forms(device: torch.device) -> None:
    """To the last bit, with exact rows, padded and eager, and by a graph; most of these steps enter no block."""
    exact, padded, (graphed, _) = in_blocks(device), in_blocks(device), with_graphs(in_blocks(device), block=BLOCK)
    counted, _ = with_graphs(in_blocks(device), block=BLOCK)
    counted.steps.forms.free_rows = 0
    loops = (exact, padded, graphed, counted)
    assert [r.row_budget for r in exact.steps.canvas.requests.values()] == [2 * BLOCK] * 4
    for loop in loops:
        loop.step(padded=False)
    for slots in (
        [0, 1, 2, 3],
        [2, 0],
        [1, 3],
        [0, 1, 2, 3],
        [2],
        [0, 3, 1],
        [0, 1, 2, 3],
        [0, 1, 2, 3],
        [3],
        [2, 1, 3],
    ):
        want = exact.step(padded=False, slots=slots)
        for loop in (padded, graphed, counted):
            got = loop.step(padded=loop is not counted, slots=slots)
            assert torch.equal(got.committed, want.committed), slots
            assert torch.equal(got.tokens, want.tokens), slots
            assert torch.equal(loop.steps.canvas.tokens, exact.steps.canvas.tokens), slots
            assert torch.equal(loop.steps.canvas.refresh, exact.steps.canvas.refresh), slots
    assert (graphed.graph_steps, counted.graph_steps, padded.graph_steps) == (10, 10, 0)
    views = exact.steps.canvas.view(torch.arange(4, device=device), [0, 1, 2, 3])
    assert (views.window_start[:2] + views.prompt_len[:2] > torch.tensor([47, 23], device=device)).all(), "other blocks"
    for loop in (padded, graphed, counted):
        for got_cache, want_cache in zip(loop.caches, exact.caches, strict=True):
            assert torch.equal(got_cache[1:], want_cache[1:])


def test_steps_in_blocks_are_those_of_the_twins(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """What kernels choose and commit is what PyTorch does."""
    loops, found = {"triton": in_blocks(device), "torch": in_blocks(device)}, {}
    for number in range(6):
        for backend, loop in loops.items():
            monkeypatch.setitem(dispatch._chosen, device.type, backend)
            result, canvas = loop.step(padded=False), loop.steps.canvas
            found[backend] = [result.committed, result.tokens, canvas.tokens.clone(), canvas.refresh, canvas.observe]
        assert all(map(torch.equal, *found.values())), number


class Endless(StepBuffers):
    """Planted fault: rows see what lies behind their blocks."""

    def load(self, size: GraphSize, *batch: Any) -> None:
        super().load(size, *batch)
        assert self.limits is not None
        self.limits.fill_(96)


@pytest.mark.parametrize(("buffers", "wrong"), [(StepBuffers, False), (Endless, True)])
def test_the_check_at_start_up_knows_blocks(device: torch.device, buffers: type[StepBuffers], wrong: bool) -> None:
    loop = in_blocks(device)
    made = buffers(SIZES[1], 96, PAGE, device, BLOCK)
    loop.caches = [torch.zeros(40, *c.shape[1:]) for c in loop.caches]
    loop.graphs = StepGraphs(SIZES[:2], made, loop.forward, Emulator().record)
    loop.graphs.capture()
    if not wrong:
        check_graphs(loop.graphs, CacheSize(40, PAGE), 29, device)
        return
    with pytest.raises(GraphError, match="16 rows differs"):
        check_graphs(loop.graphs, CacheSize(40, PAGE), 29, device)


class Frozen(StepBuffers):
    """Planted fault: the graph reads lengths into which nobody copies those of the batch."""

    def layout(self, size: GraphSize) -> PagedLayout:
        layout = super().layout(size)
        if not hasattr(self, "frozen"):
            self.frozen = self.text_lengths.clone()
        layout.__dict__["text_lengths"] = self.frozen[: size.requests + 1]
        return layout


class Reads(StepBuffers):
    """Planted fault: the host looks at the device to set up the graph's work."""

    def layout(self, size: GraphSize) -> PagedLayout:
        assert min(self.text_lengths.tolist()) >= 0
        return super().layout(size)


class Uploads(StepBuffers):
    """Planted fault: a list of the host is uploaded while the graph is recorded."""

    def layout(self, size: GraphSize) -> PagedLayout:
        layout = super().layout(size)
        del layout.__dict__["row_starts"]
        return layout


def differs(device: torch.device, buffers: type[StepBuffers]) -> bool:
    eager, graphed = Loop(device, OPTIONS[0]), Loop(device, OPTIONS[0])
    made = buffers(SIZES[-1], 96, PAGE, device)
    graphed.graphs = StepGraphs(SIZES[-1:], made, graphed.forward, Emulator().record)
    graphed.graphs.capture()
    for loop in (eager, graphed):
        loop.step(padded=False)
        loop.step()
    return any(not torch.equal(a, b) for a, b in zip(eager.caches, graphed.caches, strict=True))


@pytest.mark.parametrize(("buffers", "wrong"), [(StepBuffers, False), (Frozen, True)])
def test_a_frozen_number_shows(device: torch.device, buffers: type[StepBuffers], wrong: bool) -> None:
    assert differs(device, buffers) is wrong


@pytest.mark.parametrize(("buffers", "complaint"), [(Reads, "tolist"), (Uploads, "torch.from_numpy while")])
def test_what_a_capture_cannot_hold_is_refused(
    device: torch.device, buffers: type[StepBuffers], complaint: str
) -> None:
    with pytest.raises(AssertionError, match=complaint):
        differs(device, buffers)


@pytest.mark.parametrize("blocks", [40, 4], ids=["room", "little-room"])
def test_the_check_at_start_up_passes_sound_graphs(device: torch.device, blocks: int) -> None:
    loop, _ = with_graphs(Loop(device, OPTIONS[0], texts=[(80, 16)]), SIZES[:2])
    loop.caches = [torch.full((blocks, *c.shape[1:]), torch.nan) for c in loop.caches]
    assert loop.graphs is not None
    loop.graphs.capture()
    check_graphs(loop.graphs, CacheSize(blocks, PAGE), 29, device)


def test_the_check_at_start_up_refuses_others(device: torch.device) -> None:
    loop = Loop(device, OPTIONS[0], texts=[(80, 16)])
    loop.caches = [torch.full((9, *c.shape[1:]), torch.nan) for c in loop.caches]
    loop.graphs = StepGraphs(SIZES[:1], Frozen(SIZES[0], 96, PAGE, device), loop.forward, Emulator().record)
    loop.graphs.capture()
    with pytest.raises(GraphError, match=r"16 rows differs .* --enforce-eager"):
        check_graphs(loop.graphs, CacheSize(9, PAGE), 29, device)


READS = (ReadsImportance(),)


def test_the_smallest_graph_with_room_is_taken(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    buffers = StepBuffers(SIZES[-1], 96, PAGE, device)
    graphs = StepGraphs(SIZES, buffers, lambda *args: torch.empty(0), lambda step: step)
    assert graphs.fitting([16], [80], [READS]) == SIZES[0]
    assert graphs.fitting([9, 8], [80, 80], [READS, READS]) == SIZES[1]
    assert graphs.fitting([2, 2], [80, 80], [READS, READS]) == SIZES[1], "two requests"
    assert graphs.fitting([1] * 5, [80] * 5, [READS] * 5) is None, "five requests"
    assert graphs.fitting([33, 32], [90, 90], [(), ()]) is None, "too many rows"
    assert graphs.fitting([8], [97], [()]) is None, "too long"
    assert graphs.fitting([21], [80], [READS]) == SIZES[1], "a small map"
    monkeypatch.setattr(importance, "_SMALL_MAP", 0)
    assert graphs.fitting([21], [80], [READS]) is None, "more rows than a map may have"
    assert graphs.fitting([21], [80], [()]) == SIZES[1]
    blocks = StepGraphs(SIZES, StepBuffers(SIZES[-1], 96, PAGE, device, BLOCK), graphs.forward, lambda step: step)
    assert blocks.fitting([16, 16], [80, 80], [(), ()]) == SIZES[1]
    assert blocks.fitting([16], [80], [READS]) is None, "no maps are recorded"


def test_padding_is_at_most_an_eighth() -> None:
    sizes = graph_sizes(512, 256)
    assert sizes[0] == GraphSize(16, 1)
    assert sizes[-1].rows == 512
    assert len(sizes) < 30
    for small, large in pairwise(sizes):
        assert large.rows - small.rows - 1 < max(16, large.rows / 8)
        assert large.requests >= small.requests
    assert all(size.requests <= 3 for size in graph_sizes(512, 3))
    assert [size.rows for size in graph_sizes(40, 8)] == [16, 32, 40]
    assert graph_sizes(0, 8) == []
    assert [size.requests for size in graph_sizes(40, 8, block=4)] == [2, 4, 5]
    assert graph_sizes(512, 256, block=32) == sizes
