"""Errors of vLLM's that do not name a field, and the field that they are about."""

from __future__ import annotations

import pytest

from vllm_d2cache.options.types import OptionError
from vllm_d2cache.requests.dropped_fields import check_nested
from vllm_d2cache.requests.naming import field_of


@pytest.mark.parametrize(
    ("message", "fields", "field"),
    [
        ("Token id 7 is out of vocabulary", {"prompt", "max_tokens"}, "prompt"),
        ("Cannot apply chat template to an empty conversation.", {"input"}, "input"),
        ("Invalid JSON grammar specification.", {"messages", "response_format"}, "response_format"),
        ("Invalid JSON grammar specification.", {"structured_outputs", "response_format"}, "structured_outputs"),
        ("max_tokens must be at least 1, got -1", {"max_output_tokens"}, "max_output_tokens"),
        ("max_tokens must be at least 1, got -1", {"max_tokens"}, None),
        ("stop cannot contain an empty string.", {"stop_sequences"}, "stop_sequences"),
        ("The model `x` does not exist.", {"model"}, None),
        ("Invalid JSON grammar specification.", {"messages"}, None),
    ],
)
def test_the_field_that_the_request_sets(message: str, fields: set[str], field: str | None) -> None:
    assert field_of(message, fields) == field


def test_keys_that_are_dropped() -> None:
    check_nested("stream_options", {"include_usage": True, "include_obfuscation": False, "x": None}, {"include_usage"})
    check_nested("text", {"verbosity": "medium"}, {"verbosity"})
    for name, content in (
        ("text", {"verbosity": "low"}),
        ("stream_options", {"include_obfuscation": True}),
        ("structured_outputs", {"whitespace_pattern": "a"}),
    ):
        (key,) = content
        with pytest.raises(OptionError, match=rf"^{name}\.{key}: has no effect here"):
            check_nested(name, content, {"verbosity", "whitespace_pattern"})
