"""A request's result depends on that request alone."""

from __future__ import annotations

from typing import Any

import pytest

from tests.e2e.conftest import Engine, assert_same, steps_of

pytestmark = [pytest.mark.vllm, pytest.mark.engine]


def test_a_batch_changes_nothing(engine: Engine, requests: list[Any], alone: list[Any]) -> None:
    assert_same(engine.run(requests), alone)


def test_order_of_arrival_changes_nothing(engine: Engine, requests: list[Any], alone: list[Any]) -> None:
    assert_same(engine.run(requests[::-1])[::-1], alone)


def test_seeds_decide_and_differ(engine: Engine) -> None:
    request = {"prompt": [5, 6, 7], "max_tokens": 24, "sampling": {"temperature": 1.0, "seed": 1}}
    other = {**request, "sampling": {"temperature": 1.0, "seed": 2}}
    first, second, again = (tokens for tokens, _ in engine.run([request, other, request]))
    assert first == again != second


def test_everything_refreshed_equals_full(engine: Engine) -> None:
    base = {"prompt": list(range(40)), "max_tokens": 24}
    everything = {"current_k": 24, "rollout_p": 1.0}
    (full, full_trace), (d2, d2_trace) = engine.run(
        [{**base, "options": {"policy": "full"}}, {**base, "options": everything}]
    )
    assert d2 == full
    assert steps_of(d2_trace) == steps_of(full_trace)


def test_other_requests_aborted_midway(engine: Engine, requests: list[Any], alone: list[Any]) -> None:
    from vllm import SamplingParams

    core = engine.llm.llm_engine
    doomed = []
    for i in range(4):
        params = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True, detokenize=False)
        doomed.append(core.add_request(f"doomed-{i}", {"prompt_token_ids": [i + 1] * 30}, params))
    for i in range(6):
        core.step()
        if i >= 2:
            core.abort_request([f"doomed-{i - 2}"])
    assert_same(engine.run(requests[:4]), alone[:4])
    (path,) = engine.trace_dir.glob("doomed-0-*.jsonl")
    assert '"finish_reason": "abort"' in path.read_text()


def test_preempted_requests_start_over_and_end_the_same(engine: Engine, requests: list[Any], alone: list[Any]) -> None:
    """reset_prefix_cache(reset_running_requests=True) drops all K and V of running requests."""
    from vllm import SamplingParams

    core = engine.llm.llm_engine
    chosen = [i for i, r in enumerate(requests) if r["max_tokens"] >= 16][:3]
    outputs: dict[str, list[int]] = {}
    for i in chosen:
        r = requests[i]
        extra = {f"d2cache_{k}": v for k, v in r["options"].items()}
        params = SamplingParams(
            **{"temperature": 0.0, "ignore_eos": True, **r["sampling"]},
            max_tokens=r["max_tokens"],
            detokenize=False,
            extra_args=extra,
        )
        core.add_request(f"again-{i}", {"prompt_token_ids": r["prompt"]}, params)
    for step in range(500):
        for output in core.step():
            if output.finished:
                outputs[output.request_id] = list(output.outputs[0].token_ids)
        if step in (3, 9):
            core.reset_prefix_cache(reset_running_requests=True)
        if not core.has_unfinished_requests():
            break
    for i in chosen:
        assert outputs[f"again-{i}"] == alone[i][0], f"request {i}"


def test_requests_that_wait_for_memory_end_the_same(
    engine: Engine, requests: list[Any], alone: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As much as the largest request holds: it runs while no other holds anything."""
    scheduler = engine.llm.llm_engine.engine_core.engine_core.scheduler
    held, schedule = scheduler._held, scheduler.schedule
    limits, wanted, sums = [0], [0], []

    def watched(*args: Any, **kwargs: Any) -> Any:
        limits.append(max([0, *held.values()]))
        wanted.append(sum(held.values()))
        scheduler._memory = max(limits)
        output = schedule(*args, **kwargs)
        sums.append(sum(held[r.request_id] for r in scheduler.running))
        return output

    monkeypatch.setattr(scheduler, "schedule", watched)
    monkeypatch.setattr(scheduler, "_memory", 0)
    assert_same(engine.run(requests), alone)
    assert 0 < max(sums) <= max(limits) < max(wanted)
