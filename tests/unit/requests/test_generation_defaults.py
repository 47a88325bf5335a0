"""What is made of a checkpoint's generation_config.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.reference.oracle import ORACLE
from vllm_d2cache.models.configs import LLaDAConfig
from vllm_d2cache.requests.generation_defaults import default_problems, read_generation_defaults
from vllm_d2cache.requests.resolve import parse_server_options, resolve

# The file of the published Dream-v0-Instruct-7B.
PUBLISHED: dict[str, Any] = {
    "_from_model_config": True, "alg": "origin", "alg_temp": None, "bos_token_id": 151643, "eos_token_id": 151643,
    "eps": 0.001, "mask_token_id": None, "output_history": False, "pad_token_id": 151643, "steps": 512,
    "temperature": 0.0, "top_k": None, "top_p": None, "transformers_version": "4.46.2",
}  # fmt: skip


def test_published_file_changes_nothing_and_names_what_it_asks_in_vain() -> None:
    found = read_generation_defaults(PUBLISHED)
    assert found.options == {}
    assert set(found.ignored) == {"alg", "eps", "steps"}
    assert all(str(PUBLISHED[key]) in text for key, text in found.ignored.items())


@pytest.mark.parametrize(
    ("alg", "score"), [("maskgit_plus", "confidence"), ("topk_margin", "margin"), ("entropy", "entropy")]
)
def test_ranking_and_nucleus_become_options(alg: str, score: str) -> None:
    found = read_generation_defaults({**PUBLISHED, "alg": alg, "top_p": 0.9, "alg_temp": 0.1, "temperature": 0.2})
    options = resolve(parse_server_options(found.options), {})
    assert (options.score, options.confidence_top_p) == (score, 0.9)
    assert set(found.ignored) == {"alg_temp", "eps", "steps"}


def test_defaults_that_requests_are_refused_for_are_named() -> None:
    found = read_generation_defaults({"min_p": 0.05, "top_k": 20})
    assert found.options == {}
    assert set(found.ignored) == {"min_p"}


MASK, VOCAB = 309, 320
LLADA = LLaDAConfig.from_dict(json.loads((Path(__file__).parents[3] / "models/tiny-llada/config.json").read_text()))


def of_a_file(content: dict[str, Any]) -> list[str]:
    """What the start and doctor say of a generation_config.json."""
    return default_problems(content, {}, LLADA.generation_problems(content))


@pytest.mark.parametrize("key", ["eos_token_id", "pad_token_id", "bos_token_id", "stop_token_ids"])
@pytest.mark.parametrize("value", ["305", VOCAB, 99999, -1, 305.0, True, False, {}, "", [305, "x"], [305, VOCAB]])
def test_token_ids_that_are_none(key: str, value: Any) -> None:
    """vLLM hands the end tokens to every request, whose input would end the engine's thread."""
    (problem,) = of_a_file({key: value})
    assert problem.startswith(f"generation_config.json {key}={value!r} (must be an id")
    assert "from 0 to 319" in problem


@pytest.mark.parametrize(
    ("key", "value"), [("eos_token_id", MASK), ("eos_token_id", [305, MASK]), ("pad_token_id", MASK)]
)
def test_the_mask_ends_no_text(key: str, value: Any) -> None:
    (problem,) = of_a_file({key: value})
    assert problem.endswith("from 0 to 319, and not the mask_token_id 309)")


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"eos_token_id": None, "pad_token_id": None, "bos_token_id": None},
        {"eos_token_id": [305, 0], "pad_token_id": 319, "bos_token_id": MASK, "mask_token_id": MASK},
        {"eos_token_id": 305, "alg": ["x"], "temperature": 0.0, "do_sample": False},
        {"alg": {}},
    ],
)
def test_files_that_are_well(content: dict[str, Any]) -> None:
    assert of_a_file(content) == []
    read_generation_defaults(content)


@pytest.mark.parametrize("path", sorted(ORACLE.rglob("generation_config.json")), ids=lambda p: p.parent.name)
def test_files_of_every_family(path: Path) -> None:
    content = json.loads(path.read_text())
    config = LLaDAConfig.from_dict(json.loads((path.parent / "config.json").read_text()))
    assert default_problems(content, {}, config.generation_problems(content)) == []


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("watermarking_config", {"x": 1}),
        ("cache_implementation", "nope"),
        ("compile_config", 3),
        ("num_return_sequences", 5),
        ("self", 1),
    ],
)
def test_what_transformers_cannot_take_is_named(key: str, value: Any) -> None:
    (problem,) = of_a_file({"eos_token_id": 305, key: value})
    assert problem.startswith(f"generation_config.json {key}={value!r} (transformers cannot read it: ")


def test_a_default_and_its_type_are_one_problem() -> None:
    assert of_a_file({"max_new_tokens": "x"}) == ["generation_config.json max_new_tokens='x' (must be an integer >= 1)"]


@pytest.mark.parametrize("alg", [["x"], {}, 3])
def test_an_operators_word_for_the_ranking(alg: Any) -> None:
    (problem,) = default_problems({}, {"alg": alg})
    assert problem.startswith(f"--override-generation-config alg={alg!r} (")
