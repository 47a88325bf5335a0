"""What is made of a checkpoint's generation_config.json."""

from __future__ import annotations

from typing import Any

import pytest

from vllm_d2cache.requests.generation_defaults import read_generation_defaults
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
