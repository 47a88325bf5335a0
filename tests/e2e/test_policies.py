"""Every cache policy through the engine: as in the plain reference, and without costs it did not ask for."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.e2e.conftest import OPTIONS, Engine, runner_of
from tests.reference.llada import DenseLlada
from tests.reference.loop import Job, run_jobs
from tests.reference.oracle import ORACLE
from vllm_d2cache.mechanisms import drift, row_exits, value_directions
from vllm_d2cache.mechanisms import importance as capture
from vllm_d2cache.mechanisms.stored_outputs import StoresOutputs
from vllm_d2cache.ops import rollout as rollout_op
from vllm_d2cache.policies import POLICY_CLASSES

pytestmark = [pytest.mark.vllm, pytest.mark.engine]


def request(options: dict[str, Any], seed: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    prompt = torch.randint(0, 360, (20 + 7 * seed,), generator=generator).tolist()
    return {"prompt": prompt, "max_tokens": 24, "options": options}


def test_every_policy_is_among_the_engine_tests() -> None:
    # Of texts in blocks alone: test_block_families.py.
    assert {options.get("policy", "d2cache") for options in OPTIONS} == set(POLICY_CLASSES) - {"block"}


def test_one_batch_of_all_policies_as_in_the_reference(engine: Engine) -> None:
    requests = [request(options, seed) for seed, options in enumerate(OPTIONS)]
    for wanted, (tokens, trace) in zip(requests, engine.run(requests), strict=True):
        job = Job(wanted["prompt"], wanted["max_tokens"], wanted["options"])
        run_jobs([DenseLlada(ORACLE / "llada")], [job])
        steps = [(line["refreshed"], [tuple(pair) for pair in line["committed"]]) for line in trace[1:-1]]
        for number, (got, want) in enumerate(zip(steps, job.steps, strict=True)):
            assert got == want, f"{wanted['options']}, step {number}"
        assert tokens == job.output, wanted["options"]


def test_attention_maps_are_taken_for_those_who_read_them(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    elements: list[int] = []
    rollouts: list[int] = []
    take, rollout = capture.MapPool.take, rollout_op._rollout_of_group

    def counted_take(self: Any, layer: int, count: int, device: torch.device) -> Any:
        elements.append(count)
        return take(self, layer, count, device)

    def counted_rollout(*args: Any) -> torch.Tensor:
        *_, layout, group, _ = args
        rollouts.extend(layout.lengths[r] for r in group.requests)
        return rollout(*args)

    monkeypatch.setattr(capture.MapPool, "take", counted_take)
    monkeypatch.setattr(rollout_op, "_rollout_of_group", counted_rollout)
    frugal = [options for options in OPTIONS if not POLICY_CLASSES[options.get("policy", "d2cache")].uses]
    engine.run([request(options, seed) for seed, options in enumerate(frugal)])
    assert (sum(elements), rollouts) == (0, [])
    ((_, trace), _) = engine.run([request({"current_k": 1}, 0), request({"policy": "dual"}, 5)])
    assert sum(elements) > 0
    assert rollouts == [44] * len(trace[1:-1]), "one a step of the request that reads it, of its length"


def test_drift_is_measured_for_those_who_read_it(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    looking: list[int] = []
    received = drift.received_attention

    def counted(query: torch.Tensor, key: torch.Tensor, scale: float) -> Any:
        looking.append(len(query))
        return received(query, key, scale)

    monkeypatch.setattr(drift, "received_attention", counted)
    frugal = [options for options in OPTIONS if POLICY_CLASSES[options.get("policy", "d2cache")].name != "elastic"]
    engine.run([request(options, seed) for seed, options in enumerate(frugal)])
    assert looking == []
    elastic = {"policy": "elastic", "elastic_beta": 3}
    ((_, trace), _) = engine.run([request(elastic, 0), request({"policy": "full"}, 5)])
    layers = len(runner_of(engine).model.layers)
    assert len(looking) == layers * len(trace[1:-1]), "once a step and layer, of the request that reads it"
    assert max(looking) == 3, "in the first step too"


def test_directions_are_found_for_those_who_compare_by_them(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once for each layer but the first, whatever the number of requests and steps."""
    state = runner_of(engine).model_state
    store = state.steps.mechanisms._made[StoresOutputs]
    monkeypatch.setattr(store, "directions", value_directions.ValueDirections())
    sizes: list[tuple[int, ...]] = []
    eigh = torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda matrix: sizes.append(tuple(matrix.shape)) or eigh(matrix))
    frugal = [options for options in OPTIONS if POLICY_CLASSES[options.get("policy", "d2cache")].name != "spa"]
    engine.run([request(options, seed) for seed, options in enumerate(frugal)])
    assert sizes == []
    engine.run([request({"policy": "spa", "proxy_rank": rank}, seed) for seed, rank in enumerate((3, 200))])
    shape = runner_of(engine).model.shape
    assert sizes == [(shape.hidden_size, shape.hidden_size)] * (shape.num_layers - 1)


def test_rows_leave_for_those_who_drop_them(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind the layer of the exit a quarter of the window is computed, and those rows alone meet the head."""
    passed: list[int] = []
    stock = row_exits.ExitHook.behind

    def counted(self: Any, layer: int, hidden: torch.Tensor, residual: torch.Tensor) -> None:
        passed.append(layer)
        stock(self, layer, hidden, residual)

    monkeypatch.setattr(row_exits.ExitHook, "behind", counted)
    frugal = [options for options in OPTIONS if POLICY_CLASSES[options.get("policy", "d2cache")].name != "es"]
    engine.run([request(options, seed) for seed, options in enumerate(frugal)])
    assert passed == []
    model, mlp_rows, head_rows = runner_of(engine).model, [], []
    hooks = [
        layer.mlp.register_forward_pre_hook(lambda _, args, number=number: mlp_rows.append((number, len(args[0]))))
        for number, layer in enumerate(model.layers)
    ]
    lm_logits = model.lm_logits
    monkeypatch.setattr(model, "lm_logits", lambda hidden: head_rows.append(len(hidden)) or lm_logits(hidden))
    ((_, trace),) = engine.run([request({"policy": "es", "window": 24, "block_update_freq": 3}, 0)])
    for hook in hooks:
        hook.remove()
    layers, steps = len(model.layers), len(trace[1:-1])
    assert passed == list(range(layers)) * steps
    # The exit is behind layer 1 of four. Steps 0, 3, 6 ... let all pass.
    want = [(44,) * 4, *((24, 24, 6, 6) if step % 3 else (24,) * 4 for step in range(1, steps))]
    assert mlp_rows == [(number, n) for rows in want for number, n in enumerate(rows)]
    assert len(head_rows) == steps
    assert all(n <= rows[-1] for n, rows in zip(head_rows, want, strict=True))
