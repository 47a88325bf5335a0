"""The plan against what is really taken: steps of many kinds, their memory watched from outside."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.ops.live import LiveMemory
from tests.unit.batches import without_layers
from tests.unit.engine.test_startup_log import LAYERS, LENGTH, SHAPE, SLOTS
from tests.unit.engine.test_startup_log import config as engine_config
from vllm_d2cache.canvas.request import Request
from vllm_d2cache.canvas.traits import FamilyTraits
from vllm_d2cache.decoders import DECODER_CLASSES
from vllm_d2cache.engine.memory_plan import (
    DEFAULT_REQUEST_MEMORY,
    GIB,
    MemoryPlan,
    Network,
    Rehearsal,
    check_memory,
    plan_memory,
    request_memory,
    tensor_bytes,
)
from vllm_d2cache.graphs.step_graphs import StepBuffers, graph_sizes
from vllm_d2cache.mechanisms.base import Worker
from vllm_d2cache.mechanisms.importance import ImportanceCapture, MapPool, keeps_map
from vllm_d2cache.mechanisms.partial_forward import PartialForward
from vllm_d2cache.mechanisms.row_store import RowStore
from vllm_d2cache.mechanisms.stored_outputs import OutputHook
from vllm_d2cache.mechanisms.value_directions import ValueDirections
from vllm_d2cache.ops.paged_attention import PagedLayout
from vllm_d2cache.ops.row_stats import rows_per_tile, statistics_bytes
from vllm_d2cache.options.sampling import EditSpec, SamplingSpec
from vllm_d2cache.options.server import ServerOptions
from vllm_d2cache.options.types import OptionError
from vllm_d2cache.policies import POLICY_CLASSES
from vllm_d2cache.policies.budget import row_budget
from vllm_d2cache.requests.resolve import parse_server_options, resolve
from vllm_d2cache.step.runner import StepRunner

CPU = torch.device("cpu")
NETWORK = Network(layers=3, hidden_size=64, heads=4, intermediate_size=96, head_size=16, vocab_size=4001, itemsize=4)
PLAIN = ServerOptions({})


def captured(counts: list[int], lengths: list[int], bounds: list[int], pool: MapPool) -> None:
    """The layers of one step, as far as they leave something behind."""
    rows = sum(counts)
    layout = PagedLayout(counts, lengths, torch.zeros(len(counts), 1), [0] * len(counts), torch.zeros(rows))
    capture = ImportanceCapture(layout, [True] * len(counts), torch.zeros(rows), pool, bounds=bounds)
    query = torch.empty(rows, NETWORK.heads, NETWORK.head_size)
    with LiveMemory() as live:
        for _ in range(NETWORK.layers):
            capture.start_layer(query, torch.empty(0), 1.0)
    captured.peak = live.peak  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "requests", [[(600, 200)], [(40, 20), (300, 100), (1000, 24)], [(60, 4)] * 16], ids=["one", "ragged", "many"]
)
def test_maps_and_queries(requests: list[tuple[int, int]]) -> None:
    """First steps of all, then later ones with as many rows as each can need; a short text always keeps maps."""
    options = resolve(PLAIN, {})
    budgets = [row_budget(options, *r, None) for r in requests]
    lengths = [sum(r) for r in requests]
    held = sum(NETWORK.request_bytes(options, *r, None) for r in requests)
    rows = max(sum(lengths), sum(budgets))
    queries = NETWORK.layers * rows * NETWORK.heads * (NETWORK.head_size * NETWORK.itemsize + 4)
    captured(lengths, lengths, lengths, MapPool())
    replayed = [t for t in lengths if not keeps_map(t, t)]
    first = captured.peak  # type: ignore[attr-defined]
    assert first <= held + queries
    if replayed == lengths:
        assert 0.9 * NETWORK.layers * sum(lengths) * 4 * 16 * 4 <= first <= queries
    if not replayed:
        assert 0.9 * held <= first <= held
    captured(budgets, lengths, budgets, MapPool())
    peak = captured.peak  # type: ignore[attr-defined]
    assert peak <= held + queries
    if replayed == lengths and all(keeps_map(b, t) for b, t in zip(budgets, lengths, strict=True)):
        assert 0.9 * held <= peak <= held


@pytest.mark.parametrize("length", [8192, 32768])
def test_no_map_grows_with_the_square_of_a_long_text(length: int) -> None:
    """A tenth of a text is refreshed: queries grow with the text, maps no more than those of 4,096 positions."""
    meta, rows = torch.device("meta"), length // 10
    query = torch.empty(rows, NETWORK.heads, NETWORK.head_size, device=meta)
    for count in (rows, (1 << 22) // length):
        layout = PagedLayout([count], [length], torch.zeros(1, 1), [0], torch.zeros(count))
        pool = MapPool()
        capture = ImportanceCapture(layout, [True], torch.zeros(count), pool)
        maps = capture.start_layer(query[:count], torch.empty(0), 1.0)
        held = pool._memory[0].nbytes
        assert held <= 5 << 22
        assert (maps[0] is None) == (count == rows) == (capture.layers[0].queries is not None)
        planned = NETWORK.request_bytes(resolve(PLAIN, {}), length - 256, 256, None)
        assert held * NETWORK.layers <= planned <= NETWORK.layers * (5 << 22)


def test_maps_that_grow_do_not_stand_beside_their_predecessors() -> None:
    pool, elements = MapPool(), 10_000
    with LiveMemory() as live:
        for size in (elements // 2, elements):
            pool.take(0, size, CPU)
    assert live.peak == live.now == elements * 5 // 4 * 4


STATISTICS: list[tuple[dict[str, Any], SamplingSpec]] = [
    ({}, SamplingSpec()),
    ({"score": "margin"}, SamplingSpec(0.7, 0.9, 5)),
    ({"score": "entropy"}, SamplingSpec(0.7, edits=EditSpec(penalties=(1.2, 0.1, 0.1)))),
    ({"decoder": "klass", "threshold": 0.9, "policy": "entropy"}, SamplingSpec(0.7, 0.9, 5)),
    ({"decoder": "credit", "threshold": 0.9}, SamplingSpec(0.7, 0.9, 5, edits=EditSpec(penalties=(1.2, 0.1, 0.1)))),
    ({"decoder": "eb"}, SamplingSpec(0.7, 0.9)),
    ({"decoder": "wino", "policy": "full", "wide_in_thres": 0.0}, SamplingSpec(0.7, 0.9)),
]


@pytest.mark.parametrize(("chosen", "sampling"), STATISTICS)
def test_statistics(chosen: dict[str, Any], sampling: SamplingSpec) -> None:
    """Tiles full of rows, whatever is asked of them; the LM head's own output among it."""
    vocab = NETWORK.vocab_size
    prompt, canvas = 8, 3 * rows_per_tile(vocab)
    options = resolve(PLAIN, chosen)
    runner = StepRunner(Worker(2, prompt + canvas, CPU, FamilyTraits(0)))
    runner.add(0, Request("r", prompt, canvas, options, sampling), torch.ones(prompt, dtype=torch.int64).numpy())
    head = torch.randn(4, vocab)
    for _ in range(2):
        step = runner.open(torch.tensor([0]), [0])
        hidden = torch.randn(step.rows.positions.shape[0], 4)[step.rows.logits_rows]
        step.hooks = without_layers(step, [torch.rand(prompt + canvas)])
        with LiveMemory() as live:
            runner.close(step, hidden, lambda x: x @ head)
        # Some numbers for each row, not for each logit of a row.
        assert live.peak <= statistics_bytes(vocab, 4) + 200 * len(hidden)


def test_the_statistics_of_a_tile_are_not_overestimated_by_much() -> None:
    test_statistics({"decoder": "credit", "threshold": 0.9}, SamplingSpec(0.7, 0.9, 5))


def test_stored_outputs() -> None:
    prompt, canvas = 9, 20
    options = resolve(PLAIN, {"policy": "dllm_cache"})
    runner = StepRunner(Worker(1, prompt + canvas, CPU, FamilyTraits(0)))
    request = Request("r", prompt, canvas, options, SamplingSpec())
    runner.add(0, request, torch.ones(prompt, dtype=torch.int64).numpy())
    (stored,) = runner.open(torch.tensor([0]), [0]).hooks
    row = NETWORK.hidden_size * NETWORK.itemsize
    assert NETWORK.request_bytes(options, prompt, canvas, None) == (NETWORK.layers - 1) * stored.capacity[0] * row


class WideLayer:
    """Takes what a real layer takes for its MLP, and for queries and outputs of attention where it works in parts."""

    pages = torch.empty(0)

    def __init__(self, width: int, part: int) -> None:
        self.width, self.part = width, part

    def __call__(self, positions: torch.Tensor, hidden: torch.Tensor, residual: torch.Tensor | None) -> Any:
        stream = hidden if residual is None else hidden + residual
        attended = (
            [stream.new_empty(len(hidden), 2 * NETWORK.heads * NETWORK.head_size)] if self.part < len(hidden) else []
        )
        hidden.new_empty(min(self.part, len(hidden)), 3 * self.width)
        del attended
        return torch.zeros_like(stream), stream

    def values(self, hidden: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        raise AssertionError("no row is compared")


@pytest.mark.parametrize("width", [16, 96, 256])
@pytest.mark.parametrize("part", [10, 100, 3000])
@pytest.mark.parametrize("rows", [500, 3000])
def test_layers_that_compute_a_part_of_their_rows(width: int, part: int, rows: int) -> None:
    layers = [WideLayer(width, part)] * 3
    embedding, positions = torch.zeros(rows, NETWORK.hidden_size), torch.arange(rows)
    layout = PagedLayout([rows], [rows], torch.zeros(1, 1, dtype=torch.int32), [0], positions)
    kept = {0: (positions, positions)}
    none = torch.empty(0, dtype=torch.int64)
    behind = len(layers) - 1
    count = torch.zeros(1, behind, dtype=torch.int64)
    computed = [[rows]] * behind
    hook = OutputHook(
        positions < 0, none, positions * 0, count, computed, None, kept, {0: rows}, [0], RowStore(), ValueDirections()
    )
    partial = PartialForward([hook], layout, lambda layout: None)
    partial.run(layers, positions, embedding)  # makes the store
    with LiveMemory() as live:
        partial.run(layers, positions, embedding)
    with LiveMemory() as plain:
        hidden, residual = layers[0](positions, embedding, None)
        for layer in layers[1:]:
            hidden, residual = layer(positions, hidden, residual)
    planned = replace(NETWORK, intermediate_size=width).partial_bytes(rows, part)
    # The numbers of a row, not those of its hidden state: indices, flags.
    assert 0.5 * planned <= live.peak - plain.peak <= planned + 32 * rows


@pytest.mark.parametrize("layers", [1, 2, 8, 32])
def test_hidden_states_where_rows_leave(layers: int) -> None:
    prompt, canvas = 9, 20
    options = resolve(PLAIN, {"policy": "es"})
    runner = StepRunner(Worker(1, prompt + canvas, CPU, FamilyTraits(0, num_layers=layers)))
    request = Request("r", prompt, canvas, options, SamplingSpec())
    runner.add(0, request, torch.ones(prompt, dtype=torch.int64).numpy())
    (exiting,) = runner.open(torch.tensor([0]), [0]).hooks
    row = NETWORK.hidden_size * NETWORK.itemsize
    held = sum(0 in exits for exits in exiting.exits) * exiting.capacity[0] * row
    planned = replace(NETWORK, layers=layers).request_bytes(options, prompt, canvas, None)
    assert held == planned if layers >= 8 else held <= planned


def test_state_of_policies_and_decoders() -> None:
    plan = plan_memory(engine_config(), PLAIN)
    with LiveMemory() as live:
        runner = StepRunner(Worker(SLOTS, LENGTH, CPU, FamilyTraits(0, num_layers=LAYERS)))
        at_start = live.now
        for name in ("d2cache", "entropy", "window_diffusion", "dllm_cache", "dkv"):
            runner.planning.policy(name)
            runner.mechanisms.enter(0, POLICY_CLASSES[name].uses)
        for name in ("confidence", "klass", "credit", "wino"):
            runner.decoding.decoder(DECODER_CLASSES[name])
        made = live.now - at_start
    assert plan.canvases <= at_start
    assert 0.3 * plan.policies <= made <= plan.policies


def test_graphs() -> None:
    config = engine_config()
    assert plan_memory(config, PLAIN).graphs == 0, "eager"
    config.model_config.enforce_eager = False
    plan = plan_memory(config, parse_server_options({"graph_rows": 64}))
    sizes = graph_sizes(64, SLOTS)
    buffers = StepBuffers(sizes[-1], LENGTH, 16, CPU)
    maps = sum(MapPool().take(layer, 64 * LENGTH, CPU).nbytes for layer in range(LAYERS))
    activations = 64 * (8 * 8 * SHAPE.head_size + 3 * 256) * 2
    driver = len(sizes) * (4 << 20)
    assert tensor_bytes(buffers) + maps + activations + driver <= plan.graphs <= 1.3 * (maps + activations) + driver
    assert plan.in_forward > plan.graphs
    blocks = plan_memory(config, ServerOptions({}, graph_rows=64, block_length=4))
    made = StepBuffers(graph_sizes(64, SLOTS, 4)[-1], LENGTH, 16, CPU, 4)
    assert tensor_bytes(made) + activations + driver <= blocks.graphs < plan.graphs - maps / 2
    assert plan_memory(config, parse_server_options({"graph_rows": 0})).graphs == 0
    config.device_config.device_type = "cpu"
    assert plan_memory(config, PLAIN).graphs == 0


def test_what_running_requests_may_hold() -> None:
    network = Network.of(engine_config())
    assert network == Network(LAYERS, SHAPE.hidden_size, 4, 256, SHAPE.head_size, SHAPE.vocab_size, 2)
    assert request_memory(PLAIN, network, LENGTH) == DEFAULT_REQUEST_MEMORY
    assert request_memory(parse_server_options({"request_memory": 0.5}), network, LENGTH) == GIB // 2
    large = replace(network, layers=256)
    longest = large.request_bytes(resolve(PLAIN, {}), 16_000, 16_000, None)
    assert request_memory(PLAIN, large, 32_000) == longest > DEFAULT_REQUEST_MEMORY
    assert large.request_bytes(resolve(PLAIN, {"policy": "full"}), 100, 100, None) == 0


def test_a_request_that_can_never_be_admitted() -> None:
    config = engine_config()
    options, tight = resolve(PLAIN, {}), parse_server_options({"request_memory": 0.001})
    check_memory(options, tight, config, 100, 64)
    with pytest.raises(OptionError, match=r"max_tokens: with d2cache_policy 'd2cache', 900 prompt tokens .* 0.00 GiB"):
        check_memory(options, tight, config, 900, 64)
    check_memory(options, PLAIN, config, 900, 64)


def test_the_rehearsal_takes_what_a_step_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = MemoryPlan(
        canvases=1,
        policies=10,
        requests=100,
        graphs=1000,
        queries=1000,
        parts=500,
        partial=500,
        statistics=5000,
        rollout=7000,
    )
    rehearsal = Rehearsal(plan, torch.device("meta"))
    with LiveMemory() as live:
        rehearsal.forward()
        assert live.now == 3110
        rehearsal.sample()
        assert (live.now, live.peak) == (0, 10110)
        rehearsal.sample()  # after a dummy run that measures nothing
        assert (live.now, live.peak) == (0, 10110)

    def full(*args: Any, **kwargs: Any) -> None:
        raise torch.OutOfMemoryError("no")

    monkeypatch.setattr(torch, "empty", full)
    with pytest.raises(RuntimeError, match=r"beside the weights for .*queries=1000.* Lower --max-num-batched-tokens"):
        Rehearsal(plan, torch.device("meta")).forward()
    Rehearsal(plan, CPU).forward()
