"""Structured output through an engine that schedules asynchronously, and synchronously too; closes its engine."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest

from tests.e2e.conftest import Engine
from tests.e2e.grammars import Constraint, random_constraint
from tests.e2e.server import TINY

pytestmark = [pytest.mark.vllm, pytest.mark.engine]

OPTIONS: list[dict[str, Any]] = [
    {},
    {"threshold": 0.5},
    {"policy": "full", "tokens_per_step": 4},
    {"policy": "dual", "window": 16},
    {"policy": "dkv"},
    {"policy": "sparse_dllm", "threshold": 0.3},
    {"current_k": 2, "rollout_p": 0.02},
    {"policy": "window_diffusion", "inner_window": 4},
    {"policy": "dllm_cache", "steps": 30},
    {"policy": "elastic", "score": "margin", "threshold": 0.2},
    {"policy": "entropy"},
    {"policy": "streaming"},
    {"policy": "vicinity"},
    {"policy": "prefix", "window": 1},
]
CANVAS = 96


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    from vllm.platforms.cpu import CpuPlatform

    stock = CpuPlatform.check_and_update_config.__func__

    def keep_async(cls: type, vllm_config: Any) -> None:
        stock(cls, vllm_config)
        vllm_config.scheduler_config.async_scheduling = True  # the CPU platform switches it off

    traces = tmp_path_factory.mktemp("grammar")
    settings: dict[str, Any] = {"model": TINY, "skip_tokenizer_init": False, "max_model_len": 512}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CpuPlatform, "check_and_update_config", classmethod(keep_async))
        made = Engine(traces, additional_config={"d2cache": {"trace_dir": str(traces)}}, **settings)
    yield made
    made.close()


def request_of(number: int, constraint: Constraint | None) -> tuple[str, Any]:
    """A prompt and its sampling parameters."""
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    rng = random.Random(number)
    prompt = rng.choice(["Reverse: abcdefgh", "", "Write JSON about apples", "x" * 70])
    temperature = rng.choice([0.0, 0.0, 1.0])
    options = OPTIONS[number % len(OPTIONS)]
    wanted = None if constraint is None else StructuredOutputsParams(**{constraint.kind: constraint.value})
    params = SamplingParams(
        temperature=temperature,
        seed=number,
        max_tokens=CANVAS,
        structured_outputs=wanted,
        logprobs=2 if number % 4 == 0 else None,
        extra_args={f"d2cache_{k}": v for k, v in options.items()},
    )
    return f"<|startoftext|>{prompt}", params


def generate(engine: Engine, requests: list[tuple[str, Any]]) -> list[tuple[str, list[int], str]]:
    outputs = engine.llm.generate([p for p, _ in requests], [s for _, s in requests], use_tqdm=False)
    return [(o.outputs[0].text, list(o.outputs[0].token_ids), o.outputs[0].finish_reason) for o in outputs]


@pytest.fixture(scope="module")
def constraints() -> list[Constraint | None]:
    """A third of the requests are free."""
    rng = random.Random(0)
    return [random_constraint(rng) if i % 3 else None for i in range(60)]


@pytest.fixture(scope="module")
def requests(constraints: list[Constraint | None]) -> list[tuple[str, Any]]:
    return [request_of(i, c) for i, c in enumerate(constraints)]


@pytest.fixture(scope="module")
def together(trained: Engine, requests: list[Any]) -> list[tuple[str, list[int], str]]:
    assert trained.llm.llm_engine.vllm_config.scheduler_config.async_scheduling
    return generate(trained, requests)


def test_what_is_finished_keeps_to_its_grammar(constraints: list[Any], together: list[Any]) -> None:
    finished = 0
    for constraint, (text, _, reason) in zip(constraints, together, strict=True):
        if constraint is not None and reason == "stop":
            assert constraint.fits(text), (constraint, text)
            finished += 1
        assert reason in ("stop", "length")
    assert finished >= 0.8 * sum(c is not None for c in constraints)


def test_each_result_is_that_of_its_request_alone(trained: Engine, requests: list[Any], together: list[Any]) -> None:
    for number, request in enumerate(requests[:24]):
        assert generate(trained, [request]) == [together[number]], number


def test_synchronous_scheduling_gives_the_same(trained: Engine, requests: list[Any], together: list[Any]) -> None:
    core = trained.llm.llm_engine.engine_core.engine_core
    queue, step = core.batch_queue, core.step_fn
    assert queue is not None
    core.batch_queue, core.step_fn = None, core.step
    try:
        assert generate(trained, requests) == together
    finally:
        core.batch_queue, core.step_fn = queue, step


def test_preempted_requests_start_over_with_their_grammars(
    trained: Engine, requests: list[Any], together: list[Any]
) -> None:
    core = trained.llm.llm_engine
    for number, (prompt, params) in enumerate(requests[:8]):
        core.add_request(f"again-{number}", prompt, params.clone())
    texts: dict[str, str] = {}
    steps = 0
    while core.has_unfinished_requests():
        for output in core.step():
            if output.finished:
                texts[output.request_id] = output.outputs[0].text
        steps += 1
        if steps in (5, 9, 20):
            assert core.reset_prefix_cache(reset_running_requests=True)
    assert texts == {f"again-{number}": together[number][0] for number in range(8)}


def test_what_is_forced_costs_no_steps(trained: Engine) -> None:
    """The tiny vocabulary has few words: most of a text without a choice is one token after another."""
    params = request_of(0, Constraint("choice", ["0123456789" * 4]))[1]
    params.logprobs = None
    (output,) = trained.llm.generate(["Count"], params, use_tqdm=False)
    assert output.outputs[0].text == "0123456789" * 4
    steps = len(trained.trace(output.request_id)) - 2
    assert steps <= len(output.outputs[0].token_ids) // 4
