"""vLLM's grammar backends as the worker uses them, with the tokenizers of both families; no engine is started."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.sampling_params import SamplingParams, StructuredOutputsParams

from tests.e2e.grammars import Constraint, random_constraint
from vllm_d2cache.canvas.grammar import GrammarState, RunPrediction
from vllm_d2cache.compat.grammars import Grammars

pytestmark = pytest.mark.vllm

MODELS = Path(__file__).resolve().parents[2] / "models"


@pytest.fixture(scope="module", params=[(f, b) for f in ("llada", "dream") for b in ("xgrammar", "guidance")], ids=str)
def config(request: pytest.FixtureRequest) -> VllmConfig:
    family, backend = request.param
    arguments: Any = {"structured_outputs_config": {"backend": backend}}
    return EngineArgs(str(MODELS / f"tiny-{family}"), **arguments).create_engine_config()


@pytest.fixture(scope="module")
def grammars(config: VllmConfig) -> Grammars:
    return Grammars(config, torch.device("cpu"), None)


def params_of(config: VllmConfig, constraint: Constraint, **fields: Any) -> SamplingParams:
    """As they arrive in the worker."""
    wanted = StructuredOutputsParams(**{constraint.kind: constraint.value})
    params = SamplingParams(structured_outputs=wanted, **fields)
    params.update_from_generation_config({}, tokenizer_of(config).eos_token_id)
    params._validate_structured_outputs(config.model_config, config.structured_outputs_config, tokenizer_of(config))
    return params


def tokenizer_of(config: VllmConfig) -> Any:
    from vllm.tokenizers import cached_tokenizer_from_config

    return cached_tokenizer_from_config(config.model_config)


def allowed(state: GrammarState) -> list[int]:
    bits = torch.from_numpy(state.allowed).unsqueeze(1) >> torch.arange(32, dtype=torch.int32) & 1
    return bits.flatten().nonzero().flatten().tolist()


def wander(state: GrammarState, rng: random.Random, longest: int) -> list[int]:
    """Any tokens that are allowed, until the text ends."""
    tokens: list[int] = []
    while not state.ended and len(tokens) < longest:
        token = rng.choice(allowed(state))
        tokens += state.follow(RunPrediction(token, [token], [True], [False], 1), 1)
    return tokens


def test_whatever_is_allowed_leads_to_a_text_of_the_grammar(config: VllmConfig, grammars: Grammars) -> None:
    rng = random.Random(1)
    tokenizer = tokenizer_of(config)
    finished = 0
    for _ in range(40):
        constraint = random_constraint(rng)
        state = grammars.start(params_of(config, constraint))
        tokens = wander(state, rng, 300)
        assert tokens.count(tokenizer.eos_token_id) == state.ended
        if state.ended:
            finished += 1
            text = tokenizer.decode(tokens, skip_special_tokens=True)
            # xgrammar before 0.2.8 takes bytes that are no UTF-8 for one character of [^...]: decoded they are others.
            assert constraint.fits(text) or "\ufffd" in text, (constraint, text)
    assert finished >= 30


def test_special_tokens_are_text_only_where_they_are_shown(config: VllmConfig, grammars: Grammars) -> None:
    tokenizer = tokenizer_of(config)
    anything = Constraint("regex", "[^a]{20}")
    special = set(tokenizer.all_special_ids)
    assert not special & set(allowed(grammars.start(params_of(config, anything))))
    shown = grammars.start(params_of(config, anything, skip_special_tokens=False))
    assert set(allowed(shown)) >= set(allowed(grammars.start(params_of(config, anything))))


def test_a_grammar_starts_anew_for_each_request(config: VllmConfig, grammars: Grammars) -> None:
    params = params_of(config, Constraint("regex", "[a-f]{3}x"))
    first = grammars.start(params)
    before = allowed(first)
    wander(first, random.Random(0), 3)
    assert allowed(grammars.start(params)) == before != allowed(first)


def test_what_cannot_be_compiled_again_ends_its_request_in_every_rank(
    config: VllmConfig, grammars: Grammars, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = params_of(config, Constraint("regex", "a{2}"))
    eos = tokenizer_of(config).eos_token_id
    sums: list[float] = []

    def elsewhere(failures: torch.Tensor) -> torch.Tensor:
        sums.append(float(failures))
        return failures + 1

    monkeypatch.setattr(grammars, "_all_reduce", elsewhere)
    assert allowed(grammars.start(params)) == []
    assert sums == [0.0]
    monkeypatch.setattr(grammars, "_all_reduce", None)

    def late(request: Any) -> None:
        raise ValueError("timed out")

    monkeypatch.setattr(grammars._manager, "grammar_init", late)
    state = grammars.start(params)
    assert state.follow(RunPrediction(eos, [eos], [True], [False], 1), 1) == [eos]
    assert state.ended
