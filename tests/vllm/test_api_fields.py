"""docs/api.md names every field of vLLM's request classes, and every refused one is refused by name."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import pytest
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.exceptions import VLLMValidationError

from vllm_d2cache.compat import front_end
from vllm_d2cache.requests.check import check_sampling_params
from vllm_d2cache.requests.dropped_fields import BOOKKEEPING, WITHOUT_EFFECT, check_echo, check_fields, check_nested
from vllm_d2cache.requests.fit import check_room

CHECKS = front_end.FieldChecks(check_fields, check_nested, check_room, check_echo)
pytestmark = pytest.mark.vllm

DOC = (Path(__file__).resolve().parents[2] / "docs" / "api.md").read_text()
ROWS = re.findall(r"^\| `(\w+)` \| ([CH ]+) \| (supported|different|refused|vLLM's) \|", DOC, re.MULTILINE)
CLASSES = {"C": (CompletionRequest, {"prompt": "x"}), "H": (ChatCompletionRequest, {"messages": []})}

# A value of each refused field that a client could mean.
REFUSED: dict[str, Any] = {
    "min_p": 0.1,
    "logprob_token_ids": [1, 2],
    "prompt_logprobs": 1,
    "repetition_detection": {"max_pattern_size": 4, "min_count": 3},
    "thinking_token_budget": 16,
    "use_beam_search": True,
    "length_penalty": 0.0,
    "watermarking": True,
    "suffix": "end",
    "kv_transfer_params": {"do_remote_decode": True},
    "ec_transfer_params": {"a": 1},
    "mm_processor_kwargs": {"a": 1},
    "media_io_kwargs": {"image": {"a": 1}},
    "routed_experts_prompt_start": 3,
}
# Older releases of the window lack these.
SINCE_0_32 = {"mm_payload", "return_mm_kwargs"}
SINCE_0_33 = {"return_weight_versions"}
# Refused when the request meets the model: tests/vllm/test_front_end.py.
REFUSED_LATER = {"prompt_embeds"}
# Values that mean without, and must pass.
NEUTRAL: dict[str, Any] = {
    "length_penalty": 1.0,
    "watermarking": False,
    "use_beam_search": False,
    "suffix": None,
    "response_format": {"type": "text"},
    "metadata": {"a": "b"},
    "store": False,
    "user": "someone",
    "functions": None,
    "extra_body": {},
    "modalities": ["text"],
    "early_stopping": False,
}


@pytest.fixture(autouse=True)
def patched(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's own methods, wrapped for this test alone."""
    for cls, _ in CLASSES.values():
        for name in ("to_sampling_params", "to_beam_search_params"):
            monkeypatch.setattr(cls, name, inspect.unwrap(getattr(cls, name)))
    monkeypatch.setattr(CompletionRequest.model_fields["max_tokens"], "default", 16)
    front_end.patch_protocols(frozenset({"LLaDAModelLM"}), CHECKS)


def submit(kind: str, **fields: Any) -> None:
    """A request on its way to the engine, as far as it needs no model."""
    cls, base = CLASSES[kind]
    request = cls(**{**base, "temperature": 1.0, "max_tokens": 8, **fields})
    defaults = front_end.CanvasDefaults({})
    if request.use_beam_search:
        request.to_beam_search_params(100, defaults)
    check_sampling_params(request.to_sampling_params(100, defaults), False)


def test_the_table_lists_exactly_the_fields_of_vllm() -> None:
    """A new field of vLLM fails here: decide what it does, and write it down."""
    for kind, (cls, _) in CLASSES.items():
        listed = [name for name, where, _ in ROWS if kind in where.split()]
        assert len(listed) == len(set(listed))
        assert set(cls.model_fields) <= set(listed), kind
        assert set(listed) - set(cls.model_fields) <= SINCE_0_32 | SINCE_0_33, kind


def test_every_refused_field_has_a_value_to_try() -> None:
    assert {name for name, _, state in ROWS if state == "refused"} == set(REFUSED) | REFUSED_LATER
    assert set(WITHOUT_EFFECT) <= set(REFUSED)
    assert all(f"`{name}`" in DOC for name in BOOKKEEPING)


@pytest.mark.parametrize(
    ("field", "kind"), [(f, kind) for f in REFUSED for kind in CLASSES if f in CLASSES[kind][0].model_fields]
)
def test_refused_fields_are_refused_by_name(field: str, kind: str) -> None:
    extra = {"logprobs": 2 if kind == "C" else True, "top_logprobs": 2} if field == "logprob_token_ids" else {}
    if kind == "C":
        extra.pop("top_logprobs", None)
    with pytest.raises((VLLMValidationError, ValueError), match=field):
        submit(kind, **{field: REFUSED[field]}, **extra)


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("field", NEUTRAL)
def test_neutral_values_pass(field: str, kind: str) -> None:
    submit(kind, **{field: NEUTRAL[field]})


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("field", ["max_tokns", "guided_json", "functions", "best_of", "d2cache_window"])
def test_unknown_fields_are_refused_by_name(field: str, kind: str) -> None:
    with pytest.raises(VLLMValidationError, match=f"{field}: no such field"):
        submit(kind, **{field: 3})


@pytest.mark.parametrize("kind", CLASSES)
def test_other_models_are_left_alone(kind: str) -> None:
    cls, base = CLASSES[kind]
    request = cls(**base, nonsense=1, length_penalty=2.0, watermarking=True)
    assert request.to_sampling_params(10, {}) is not None
    assert request.to_beam_search_params(10, {}) is not None


@pytest.mark.parametrize("kind", CLASSES)
def test_supported_fields_pass(kind: str) -> None:
    top = {"logprobs": 3} if kind == "C" else {"logprobs": True, "top_logprobs": 3}
    submit(
        kind,
        **top,
        n=2,
        seed=3,
        top_p=0.9,
        top_k=5,
        min_tokens=2,
        logit_bias={"5": 2.0},
        allowed_token_ids=[1, 2],
        bad_words=["x"],
        presence_penalty=0.5,
        frequency_penalty=0.5,
        repetition_penalty=1.1,
        stop=["x"],
        stop_token_ids=[4],
        vllm_xargs={"d2cache_window": 4},
    )


GRAMMARS: list[dict[str, Any]] = [
    {"structured_outputs": {"regex": "a+"}},
    {"structured_outputs": {"choice": ["a", "b"]}},
    {"response_format": {"type": "json_object"}},
    {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}}},
]
WITHOUT_GRAMMAR: dict[str, Any] = {
    "ignore_eos": True,
    "min_tokens": 2,
    "bad_words": ["x"],
    "allowed_token_ids": [1, 2],
    "vllm_xargs": {"d2cache_canvas": [-1, 5, -1]},
}


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("grammar", GRAMMARS, ids=str)
def test_what_may_leave_a_grammar_no_token_is_refused_by_name(grammar: dict[str, Any], kind: str) -> None:
    submit(kind, **grammar, n=2, seed=1, logit_bias={"5": 2.0}, presence_penalty=0.5, stop=["x"], stop_token_ids=[4])
    for field, value in WITHOUT_GRAMMAR.items():
        submit(kind, **{field: value})
        name = "d2cache_canvas" if field == "vllm_xargs" else field
        with pytest.raises((VLLMValidationError, ValueError), match=f"{name}: does not go with structured output"):
            submit(kind, **grammar, **{field: value})


def test_a_given_canvas_sets_the_length() -> None:
    defaults = front_end.CanvasDefaults({})
    xargs = {"d2cache_canvas": [5, -1, -1]}
    chat = ChatCompletionRequest(messages=[], vllm_xargs=xargs)
    assert chat.to_sampling_params(256, defaults).max_tokens == 3
    completion = CompletionRequest(prompt="x", vllm_xargs=xargs)
    assert completion.to_sampling_params(256, defaults).max_tokens == completion.max_tokens == 3
    asked = ChatCompletionRequest(messages=[], vllm_xargs=xargs, max_tokens=9)
    assert asked.to_sampling_params(9, defaults).max_tokens == 9


@pytest.mark.parametrize("option", ["d2cache_report", "d2cache_snapshots"])
def test_reports_and_snapshots_are_of_one_prompt(option: str) -> None:
    values = {"vllm_xargs": {option: 1}}
    defaults = dict.fromkeys(WITHOUT_EFFECT)
    for prompt in ("x", ["x"], [1, 2, 3], [[1, 2]]):
        check_fields({**values, "prompt": prompt}, defaults, {})
    for several in (["x", "y"], [[1], [2]]):
        with pytest.raises(ValueError, match=f"{option}: .* this request has 2"):
            check_fields({**values, "prompt": several}, defaults, {})


def test_vllm_still_lets_unknown_fields_through() -> None:
    """Fails when vLLM refuses them itself, so that this check can go."""
    assert CompletionRequest(prompt="x", nonsense=1).model_extra == {"nonsense": 1}
