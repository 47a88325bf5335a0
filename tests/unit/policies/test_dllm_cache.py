"""dllm_cache: rows by hand, layers against the trace, and layers that compute some of their rows.

docs/methods/d2cache.md, 6.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import nn

from tests.reference.llada import DenseLlada
from tests.reference.loop import Job, run_jobs
from tests.reference.oracle import ORACLE, load_case
from tests.unit.batches import LAYERS, Batch, FakeJob, hook_of
from tests.unit.replay import one_by_one, replay
from vllm_d2cache.mechanisms.partial_forward import BeforeLayer, PartialForward
from vllm_d2cache.mechanisms.row_store import RowStore
from vllm_d2cache.mechanisms.stored_outputs import OutputHook
from vllm_d2cache.mechanisms.value_directions import ValueDirections
from vllm_d2cache.ops.paged_attention import PagedLayout
from vllm_d2cache.ops.rollout import TensorParallel
from vllm_d2cache.ops.value_change import change_parts

P, G = 3, 8
ALL, CANVAS = list(range(11)), list(range(3, 11))


def test_each_layer_computes_the_rows_of_the_trace() -> None:
    """The specification in loops, under this policy's plans."""
    name = "llada.dllm_semi8"
    case = load_case(name)
    job = Job(case.prompt, case.canvas_length, case.options)
    run_jobs([DenseLlada(ORACLE / "llada")], [job])
    raw = json.loads((ORACLE / "traces" / f"{name}.json").read_text())
    want = [[layer["refreshed"][0] for layer in step["dllm_layers"]] for step in raw["steps"]]
    assert job.layers is not None
    assert job.layers.refreshed == want


def run(shift: int = 0, **options: Any) -> list[Any]:
    moves = one_by_one(1, 0, 3, 2, 7, 4, 6, 5)
    return replay({"policy": "dllm_cache", "kp": 4, "kr": 3, "rou": 0.3, "window": 4, **options}, P, G, moves, shift)


def test_prompt_and_canvas_are_refreshed_by_their_periods() -> None:
    got = run()
    assert [s.refreshed for s in got] == [ALL, CANVAS, CANVAS, CANVAS, ALL, CANVAS, CANVAS, CANVAS]
    # Rows behind the first layer: all, two changed ones (0.3 of 8), all of the canvas, prompt and changed ones.
    assert [s.stored.computed[0][0] for s in got] == [11, 2, 2, 8, 3 + 2, 2, 8, 2]
    assert [len(s.stored.compared) for s in got] == [0, 8, 8, 0, 8, 8, 0, 8]


def test_a_share_of_zero_compares_nothing() -> None:
    got = run(rou=0)
    assert [s.stored.computed[0][0] for s in got] == [11, 0, 0, 8, 3, 0, 8, 0]
    assert not any(len(s.stored.compared) for s in got)


def test_a_shifted_family_carries_the_row_its_first_slot_is_read_from() -> None:
    got = run(shift=1)
    assert [s.refreshed for s in got[:5]] == [ALL, ALL[2:], ALL[2:], ALL[2:], ALL]
    assert [s.stored.computed[0][0] for s in got[:5]] == [11, 2, 2, 8, 5]
    assert got[1].stored.stored.tolist() == [True] * 9
    assert got[1].stored.compared.tolist() == list(range(1, 9)), "its values are not looked at"
    assert got[3].stored.stored.tolist() == [True] + [False] * 8


def test_rows_of_mates_are_computed_and_nobody_else_pays() -> None:
    batch = Batch([FakeJob([1] * 4, 6, {"policy": name}) for name in ("d2cache", "dllm_cache")])
    for i in range(2):
        batch.add(i)
    slots = [batch.slot(i) for i in range(2)]
    batch.step([0, 1])
    step = batch.runner.open(torch.tensor(slots), slots)
    rows = step.rows
    hook = hook_of(step, OutputHook)
    first = rows.counts[0]
    assert hook.stored.tolist() == [False] * first + [True] * 6
    assert hook.computed == [[first, 1]] * (LAYERS - 1)
    assert list(hook.kept) == [1]
    assert hook_of(batch.runner.open(torch.tensor(slots[:1]), slots[:1]), OutputHook) is None


# ---- layers


class ToyLayer(nn.Module):
    """Adds ten times a row's position to the stream, and notes the rows it computes; values are the stream's."""

    def __init__(self, scale: float = 10.0) -> None:
        super().__init__()
        self.scale = scale
        self.pages = torch.zeros(2, 1, 16, 8)  # [blocks, kv heads, block size, 2 * head size]
        self.seen: list[list[int]] = []

    def forward(self, positions: torch.Tensor, hidden: torch.Tensor, residual: torch.Tensor | None) -> Any:
        self.seen.append(positions.tolist())
        stream = hidden if residual is None else hidden + residual
        return (self.scale * positions.unsqueeze(1)).expand_as(stream).clone(), stream

    def values(self, hidden: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return (hidden + residual).unsqueeze(1)


def stored_rows(stored: list[int], compared: list[int], count: int, computed: int) -> tuple:
    """One request of six rows; the first is a prompt row, the second one's output is kept for a shifted family."""
    flags = torch.zeros(6, dtype=torch.bool)
    flags[stored] = True
    kept = {0: (torch.arange(1, 6), torch.arange(5))}
    request = torch.zeros(6, dtype=torch.int64)
    counts = torch.tensor([[count] * 2])
    return flags, torch.tensor(compared), request, counts, [[computed]] * 2, None, kept, {0: 5}


def forward(layers: list[ToyLayer], rows: tuple, embedding: torch.Tensor, store: RowStore, **more: Any) -> Any:
    layouts: list[PagedLayout] = []
    layout = PagedLayout([6], [6], torch.zeros(1, 1, dtype=torch.int32), [0], torch.arange(6))
    run = PartialForward([OutputHook(*rows, [7], store, ValueDirections(), **more)], layout, layouts.append)
    hidden, residual = run.run(layers, torch.arange(6), embedding)
    return hidden + residual, layouts


def test_stored_rows_add_what_their_layer_added_last() -> None:
    layers, store = [ToyLayer(), ToyLayer(), ToyLayer()], RowStore()
    everything, _ = forward(layers, stored_rows([], [], 0, 6), torch.zeros(6, 4), store)
    assert everything[:, 0].tolist() == [0.0, 30.0, 60.0, 90.0, 120.0, 150.0]
    for layer in layers:
        layer.scale = 1.0  # from now on layers add less
        layer.pages[0, 0, :6, 4:] = torch.eye(6)[:, :4] + 1.0  # old values, each in a direction of its own
    embedding = torch.ones(6, 4)
    embedding[3] = torch.tensor([-9.0, 1.0, 1.0, 1.0])  # its values changed most
    got, layouts = forward(layers, stored_rows([1, 2, 3, 4, 5], [2, 3, 4, 5], 1, 2), embedding, store)
    assert layers[0].seen[-1] == [0, 1, 2, 3, 4, 5]
    assert layers[1].seen[-1] == layers[2].seen[-1] == [0, 3]
    # The first layer's new output, then 10 p from each store, or p where computed.
    assert got[:, 1].tolist() == [1.0, 1 + 21.0, 1 + 42.0, 1 + 9.0, 1 + 84.0, 1 + 105.0]
    assert [layout.counts for layout in layouts] == [[2], [2], [6]]
    assert layouts[0].slots.tolist() == [0, 3]
    # What was computed is stored now.
    again, _ = forward(layers, stored_rows([1, 2, 3, 4, 5], [], 0, 1), embedding, store)
    assert again[:, 1].tolist() == got[:, 1].tolist()
    # Values of compared rows are written, whether the row is computed or not.
    assert layers[1].pages[0, 0, 2, 4:].tolist() == [3.0] * 4


def test_shadows_of_mates_are_always_computed() -> None:
    """Two rows behind the text, in no page: every layer computes them, and lays out the text alone."""
    layers, store = [ToyLayer(), ToyLayer()], RowStore()
    forward(layers, stored_rows([], [], 0, 6), torch.zeros(6, 4), store)
    layout = PagedLayout([6], [6], torch.zeros(1, 1, dtype=torch.int32), [0], torch.arange(6))
    layouts: list[PagedLayout] = []
    hook = OutputHook(*stored_rows([1, 2, 3, 4, 5], [], 0, 1), [7], store, ValueDirections())
    run = PartialForward([hook], layout, layouts.append)
    hidden, residual = run.run(layers, torch.tensor([0, 1, 2, 3, 4, 5, 8, 9]), torch.zeros(8, 4))
    assert layers[1].seen[-1] == [0, 8, 9]
    assert [(at.counts, at.slots.tolist()) for at in layouts] == [([1], [0]), ([6], list(range(6)))]
    assert (hidden + residual)[:, 0].tolist() == [20.0 * p for p in (0, 1, 2, 3, 4, 5, 8, 9)]


def test_ranks_with_different_heads_agree() -> None:
    """The sums of both halves decide; the first half alone would choose another row."""
    new = torch.tensor([[1.0, 0.0, 9.0, 1.0], [0.0, 1.0, 9.0, 9.0]])
    old = torch.tensor([[1.0, 1.0, 9.0, 1.0], [1.0, 1.0, 9.0, -9.0]])
    rows = (
        torch.ones(2, dtype=torch.bool),
        torch.arange(2),
        torch.zeros(2, dtype=torch.int64),
        torch.tensor([[1]]),
        [[1]],
        None,
        {},
        {},
    )
    layout = PagedLayout([2], [2], torch.zeros(1, 1, dtype=torch.int32), [0], torch.arange(2))

    def chosen(part: slice, ranks: TensorParallel | None) -> list[int]:
        layer = ToyLayer()
        layer.pages = torch.zeros(1, 1, 16, 2 * new[:, part].shape[1])
        layer.pages[0, 0, :2, new[:, part].shape[1] :] = old[:, part]
        hook = OutputHook(*rows, [0], RowStore(), ValueDirections(), ranks)
        zero = torch.zeros_like(new[:, part])
        computed = torch.ones(2, dtype=torch.bool)
        hook.narrow(BeforeLayer(1, 2, layer, torch.arange(2), new[:, part], zero, layout.slots), computed)
        return computed.nonzero().flatten().tolist()

    total = change_parts(new.unsqueeze(1), old.unsqueeze(1))
    assert chosen(slice(0, 4), None) == [1]
    assert chosen(slice(0, 2), None) == [0]
    ranks = TensorParallel(2, lambda _: total)
    assert chosen(slice(0, 2), ranks) == chosen(slice(2, 4), ranks) == [1]


def test_a_layer_without_rows_is_not_called() -> None:
    layers, store = [ToyLayer(), ToyLayer()], RowStore()
    forward(layers, stored_rows([], [], 0, 6), torch.zeros(6, 4), store)
    got, layouts = forward(layers, stored_rows([0, 1, 2, 3, 4, 5], [], 0, 0), torch.zeros(6, 4), store)
    assert [len(layer.seen) for layer in layers] == [2, 1]
    assert [layout.counts for layout in layouts] == [[6]]
    assert got[1:, 0].tolist() == [20.0, 40.0, 60.0, 80.0, 100.0]


@pytest.mark.parametrize("slot_reused", [False, True])
def test_a_slot_forgets_its_request(slot_reused: bool) -> None:
    store = RowStore()
    like = torch.zeros(1, 4)
    store.of(3, 2, 5, like).fill_(1.0)
    if slot_reused:
        store.drop(3)
    assert store.of(3, 2, 5, like).sum() == (0.0 if slot_reused else 40.0)
