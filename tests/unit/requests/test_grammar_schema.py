"""JSON schemas that xgrammar would not keep are refused by what it would not keep; those that it keeps pass."""

from __future__ import annotations

import json
from typing import Any

import pytest

from vllm_d2cache.options.types import OptionError
from vllm_d2cache.requests.grammar_schema import check_schema, check_structural_tag

NAME = {"type": "object", "properties": {"a": {}}}
REFUSED: list[tuple[dict[str, Any], str]] = [
    *(
        ({key: wrong}, rf"'{key}' {wrong!r}; it must be an integer >= 0")
        for key in ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties")
        for wrong in (-1, 1.5, 2.0, True, None, "1")
    ),
    *(({f"min{n}": 3, f"max{n}": 2}, f"'min{n}' 3 above 'max{n}' 2") for n in ("Length", "Items", "Properties")),
    *(({"$ref": where}, "a '\\$ref' that") for where in ("http://a/b", "x.json", "#foo", "", "/a", 1, None)),
    *(({key: "#"}, f"'\\{key}', which backend xgrammar would ignore") for key in ("$dynamicRef", "$recursiveRef")),
    *(({key: []}, f"an empty '{key}'") for key in ("anyOf", "oneOf", "allOf", "enum", "type")),
    *(({"required": wrong}, "a 'required' that is no list of names") for wrong in ("a", [1], None, {"a": 1})),
    ({**NAME, "required": ["a", "b"]}, "'b' in 'required'"),
    ({**NAME, "required": ["b"], "additionalProperties": False}, "'b' in 'required'"),
    ({"type": ["null", "object"], "required": ["b"], "additionalProperties": {}}, "'b' in 'required'"),
    ({"required": ["b"], "patternProperties": {"^b$": {}}}, "'b' in 'required'"),
    ({"type": "string", "pattern": "(?=a)b"}, r"JSON schema's pattern has '\(\?=\.\.\.\)'"),
    ({"type": "string", "pattern": "^a$b"}, r"JSON schema's pattern has '\$'"),
    ({"patternProperties": {"(?!a)b": {}}}, "JSON schema's pattern has"),
    ({"type": "string", "pattern": "^a$", "format": "date"}, "'pattern' beside 'format'"),
    ({"const": 10**25}, "the number 10000000000000000000000000"),
    ({"enum": [1, {"a": [12345678901234567890]}]}, "the number 12345678901234567890"),
    ({"const": 10**400}, "the number 1000"),
]
KEPT: list[Any] = [
    True,
    {},
    {"type": "string", "minLength": 0, "maxLength": 0},
    {"type": "array", "minItems": 2, "maxItems": 2, "prefixItems": [{}, {}]},
    {"type": "object", "minProperties": 0, "maxProperties": 5},
    {"$ref": "#/$defs/a", "$defs": {"a": {"type": "null"}}},
    {"type": "array", "items": {"$ref": "#"}},
    {"anyOf": [{"type": "null"}], "title": "a"},
    {**NAME, "required": ["a"]},
    {**NAME, "required": []},
    {"type": "string", "required": ["b"]},  # says nothing of a string
    {"type": "string", "format": "date"},
    {"type": "string", "pattern": "^(a|b)$"},
    {"enum": [1e300, 0.1, 1e-7, -0.0, 2**53 + 1, -(2**63), 2**63, 10**22, True, None, "(?=a)", [], {"minLength": -1}]},
    {"properties": {"minLength": {"const": -1}, "$ref": {"type": "string"}, "required": {}}, "default": {"$ref": "a"}},
]


def places(schema: Any) -> list[Any]:
    """The schema at different depths, and as text."""
    by_reference = {"$ref": "#/other/a", "other": {"a": schema}}
    inside = {"type": "object", "properties": {"x": {"anyOf": [{"type": "null"}, schema]}}}
    return [schema, json.dumps(schema), inside, by_reference, {"$defs": {"x": {"items": schema}}}]


@pytest.mark.parametrize(("schema", "named"), REFUSED, ids=str)
def test_refused_by_name(schema: dict[str, Any], named: str) -> None:
    for place in places(schema):
        with pytest.raises(OptionError, match=rf"^structured_outputs: the .*{named}"):
            check_schema(place, "xgrammar")
        check_schema(place, "guidance")


@pytest.mark.parametrize("schema", KEPT, ids=str)
def test_kept(schema: Any) -> None:
    for place in places(schema):
        check_schema(place, "xgrammar")


def test_circles_end() -> None:
    circle = {"$ref": "#/$defs/a", "$defs": {"a": {"items": {"$ref": "#/$defs/b"}}, "b": {"$ref": "#/$defs/a"}}}
    check_schema(circle, "xgrammar")
    for nowhere in ("#/$defs/c", "#/$defs/a/items/x/y", "#/"):
        check_schema({**circle, "$ref": nowhere}, "xgrammar")  # vLLM refuses it


def formats(content: dict[str, Any]) -> list[dict[str, Any]]:
    """Structural tags that hold a format at different places."""
    tag = {"type": "tag", "begin": "<a>", "content": content, "end": "</a>"}
    triggered = {"type": "triggered_tags", "triggers": ["<a"], "tags": [tag]}
    both = {"type": "sequence", "elements": [{"type": "any_text"}, {"type": "or", "elements": [triggered, content]}]}
    return [{"type": "structural_tag", "format": each} for each in (content, tag, triggered, both)]


@pytest.mark.parametrize(("schema", "named"), REFUSED[::7], ids=str)
def test_schemas_of_structural_tags(schema: dict[str, Any], named: str) -> None:
    older = {"structures": [{"begin": "<a>", "schema": schema, "end": "</a>"}], "triggers": ["<a>"]}
    for tag in (older, *formats({"type": "json_schema", "json_schema": schema, "style": "qwen_xml"})):
        with pytest.raises(OptionError, match=rf"^structured_outputs: the .*{named}"):
            check_structural_tag(json.dumps(tag), "xgrammar")
        check_structural_tag(json.dumps(tag), "guidance")


def test_expressions_of_structural_tags() -> None:
    for tag in formats({"type": "regex", "pattern": r"\Aa"}):
        with pytest.raises(OptionError, match=r"^structured_outputs: the regex has"):
            check_structural_tag(json.dumps(tag), "xgrammar")
    kept = {"type": "json_schema", "json_schema": {"const": {"type": "regex", "pattern": r"\A"}}}
    for content in (kept, {"type": "regex", "pattern": "^a$"}, {"type": "const_string", "value": r"\A"}):
        for tag in formats(content):
            check_structural_tag(json.dumps(tag), "xgrammar")
