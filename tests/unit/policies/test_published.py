"""The step runner against the specification written out in loops, over random options of both families."""

from __future__ import annotations

import random
from typing import Any

import pytest

from tests.reference.loop import Job, run_jobs
from tests.reference.oracle import case_names, load_case
from tests.reference.published import denoise
from tests.unit.test_oracle import MODELS, dense_model
from vllm_d2cache.options.server import ServerOptions
from vllm_d2cache.requests.resolve import resolve


def random_case(seed: int) -> tuple[list[int], int, dict[str, Any]]:
    """A prompt, a canvas length and options, reaching into corners: canvases of one slot, prompts of one token."""
    rng = random.Random(seed)
    prompt = [rng.randrange(360) for _ in range(rng.choice([1, 2, 13, 40]))]
    canvas = rng.choice([1, 2, 9, 24, 32, 64])
    options: dict[str, Any] = {
        "policy": rng.choice(["full", "d2cache", "d2cache", "d2cache"]),
        "window": rng.choice([0, 0, 1, 5, 8, 32]),
        "tokens_per_step": rng.choice([1, 1, 3]),
        "score": rng.choice(["confidence", "confidence", "margin", "entropy"]),
        "sigma": rng.choice([0, 3.0, 10.0]),
        "selection_sigma": rng.choice([0, 10.0, 30.0]),
        "current_k": rng.choice([1, 4, 8, 32, 1000]),
        "rollout_p": rng.choice([0.0, 0.1, 0.4, 1.0]),
        "inflate_w": rng.choice([0, 0, 2, 4]),
        "confidence_memory": rng.choice(["first", "latest"]),
        "confidence_top_p": rng.choice([1.0, 0.9, 0.6]),
    }
    options |= rng.choice([{}, {"threshold": 0.05}, {"threshold": 0.3}, {"factor": 1.0}])
    return prompt, canvas, options


@pytest.mark.slow
@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("seed", range(20))
def test_denoiser_follows_the_specification(family: str, seed: int) -> None:
    prompt, canvas, options = random_case(seed)
    want_steps, want_tokens = denoise(dense_model(family), prompt, canvas, resolve(ServerOptions({}), options))
    job = Job(prompt, canvas, options)
    run_jobs([dense_model(family)], [job])
    for step, (got, want) in enumerate(zip(job.steps, want_steps, strict=True)):
        assert got == want, f"step {step} of {options}"
    assert job.output == want_tokens


# The loops know these policies and one decoder; the others have their own.
KNOWN = [("full", "confidence"), ("d2cache", "confidence")]
CASES = [
    name
    for family in MODELS
    for name in case_names(family)
    if tuple(load_case(name).options[key] for key in ("policy", "decoder")) in KNOWN
]


@pytest.mark.parametrize("name", CASES)
def test_the_specification_in_loops_reproduces_the_traces(name: str) -> None:
    case = load_case(name)
    options = resolve(ServerOptions({}), case.options)
    steps, tokens = denoise(dense_model(name.split(".")[0]), case.prompt, case.canvas_length, options)
    assert steps == case.steps
    assert tokens == case.final_tokens
