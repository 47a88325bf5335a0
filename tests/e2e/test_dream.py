"""Dream through the engine: the published implementation's traces and logits, and the specification written in loops.

Has an engine of its own and closes it: one process holds one at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.e2e.conftest import (
    OPTIONS,
    Engine,
    assert_golden_logits,
    assert_same,
    assert_traces,
    mixed_requests,
    steps_of,
)
from tests.reference.dream import DenseDream
from tests.reference.loop import Job, run_jobs
from tests.reference.oracle import ORACLE
from tests.reference.published import denoise
from tests.unit.policies.test_published import random_case
from vllm_d2cache.options.server import ServerOptions
from vllm_d2cache.requests.resolve import resolve

pytestmark = [pytest.mark.vllm, pytest.mark.engine]


@pytest.fixture(scope="module")
def dream(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    made = Engine(tmp_path_factory.mktemp("dream"), model=str(ORACLE / "dream"))
    yield made
    made.close()


def test_all_traces_through_generate(dream: Engine) -> None:
    assert_traces(dream, "dream")


@pytest.mark.parametrize("row", range(3))
def test_published_logits_through_the_engine(dream: Engine, row: int) -> None:
    assert_golden_logits(dream, "dream", row)


def test_engine_follows_the_specification(dream: Engine) -> None:
    """Random options of every kind, all in one batch."""
    cases = [random_case(seed) for seed in range(60, 84)]
    requests = [{"prompt": p, "max_tokens": g, "options": o} for p, g, o in cases]
    for (prompt, canvas, options), (tokens, trace) in zip(cases, dream.run(requests), strict=True):
        steps = [(line["refreshed"], [tuple(pair) for pair in line["committed"]]) for line in trace[1:-1]]
        wanted, final = denoise(DenseDream(ORACLE / "dream"), prompt, canvas, resolve(ServerOptions({}), options))
        assert steps == wanted, options
        assert tokens == final, options


@pytest.mark.parametrize("decoded", ["plainly", "in windows"])
def test_a_pad_token_of_its_own_ends_a_text(dream: Engine, decoded: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Published code of the family pads behind a text: the pad must end it where it is not the end-of-text token."""
    request = {"prompt": [3, 9, 27], "max_tokens": 24, "options": {"window": 8} if decoded == "in windows" else {}}
    (whole,) = dream.tokens([request])
    pad = whole[10]
    named = {**request, "sampling": {"ignore_eos": False, "stop_token_ids": [pad]}}
    unnamed = {**request, "sampling": {"ignore_eos": False}}
    (ended,) = dream.tokens([named])
    assert ended.index(pad) == len(ended) - 1 < 23
    assert dream.tokens([unnamed]) == [whole]
    monkeypatch.setattr(dream.llm.llm_engine.vllm_config.model_config.hf_config, "pad_token_id", pad)
    assert dream.tokens([unnamed]) == [ended]
    assert dream.tokens([request]) == [whole]  # whoever ignores the end is given all


def test_layers_that_compute_a_part_of_the_rows(dream: Engine) -> None:
    """A row left of the canvas, biased values and budgets of Dream's own, in one batch as in the reference."""
    policies = [options for options in OPTIONS if options.get("policy") in ("dllm_cache", "spa", "es")]
    assert len(policies) == 3
    requests = [{"prompt": [7, 8 + seed, 9], "max_tokens": 24, "options": o} for seed, o in enumerate(policies)]
    for wanted, (tokens, trace) in zip(requests, dream.run(requests), strict=True):
        job = Job(wanted["prompt"], wanted["max_tokens"], wanted["options"])
        run_jobs([DenseDream(ORACLE / "dream")], [job])
        commits = [[tuple(pair) for pair in line["committed"]] for line in trace[1:-1]]
        assert commits == [moves for _, moves in job.steps], wanted["options"]
        assert tokens == job.output


def test_a_batch_changes_nothing(dream: Engine) -> None:
    requests = mixed_requests(12, seed=1)
    alone = [dream.run([request])[0] for request in requests]
    assert_same(dream.run(requests), alone)


def test_what_everything_refreshed_means(dream: Engine) -> None:
    """With current_k and rollout_p at their ends all positions are refreshed but one.

    The last prompt position serves slot 0 alone (docs/methods/d2cache.md, section 3.5), so it goes stale when slot 0 is
    decoded; up to that step the run is full recompute's. Filling gaps of one position brings it back.
    """
    prompt, canvas = list(range(40)), 24
    everything = {"current_k": canvas, "rollout_p": 1.0}
    options: list[dict[str, Any]] = [{"policy": "full"}, everything, {**everything, "inflate_w": 2}]
    requests = [{"prompt": prompt, "max_tokens": canvas, "options": o} for o in options]
    (full, full_trace), (_, bare_trace), (filled, filled_trace) = dream.run(requests)
    assert filled == full
    assert steps_of(filled_trace) == steps_of(full_trace)
    committed = [[slot for slot, _ in line["committed"]] for line in full_trace[1:-1]]
    first = next(i for i, slots in enumerate(committed) if 0 in slots)
    assert steps_of(bare_trace)[: first + 1] == steps_of(full_trace)[: first + 1]
    all_but_one = [p for p in range(len(prompt) + canvas) if p != len(prompt) - 1]
    assert all(line["refreshed"] == all_but_one for line in bare_trace[first + 2 : -1])
