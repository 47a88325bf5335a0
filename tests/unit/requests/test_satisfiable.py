"""Grammars without a text are told from those with one, whatever their form; so are those that do not compile."""

from __future__ import annotations

import json
import time
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_d2cache.options.types import OptionError
from vllm_d2cache.requests import satisfiable
from vllm_d2cache.requests.satisfiable import check_satisfiable, is_satisfiable

pytest.importorskip("xgrammar")
FORMS = ("regex", "json", "grammar", "structural_tag")


def check(**form: Any) -> None:
    check_satisfiable(SimpleNamespace(**{**dict.fromkeys(FORMS), **form}), "xgrammar")


def tag(**content: Any) -> str:
    return json.dumps({"type": "structural_tag", "format": content})


NOTHING = r"a[^\s\S]"
WITHOUT: list[dict[str, Any]] = [
    {"grammar": "root ::= root"},
    {"grammar": 'root ::= "a" b\nb ::= "c" b'},
    {"grammar": 'root ::= a b\na ::= "x" | ""\nb ::= b "y" | c\nc ::= "z" b'},
    {"grammar": 'root ::= a+\na ::= "x" a'},
    {"grammar": 'root ::= a{2,3}\na ::= "x" a'},
    {"regex": NOTHING},
    {"regex": "b(a[^\\s\\S])+"},
    {"regex": "[^\\x00-\\U0010ffff]"},
    {"json": {"type": "string", "pattern": f"^{NOTHING}$"}},
    {"json": {"$ref": "#"}},
    {"json": {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}},
    {"json": {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"], "additionalProperties": False}},
    {"structural_tag": tag(type="regex", pattern=NOTHING)},
]
WITH: list[dict[str, Any]] = [
    {"grammar": 'root ::= root | "a"'},
    {"grammar": 'root ::= "a" b | "c"\nb ::= "c" b'},
    {"grammar": 'root ::= a* "x"\na ::= "x" a'},
    {"grammar": 'root ::= a? b\na ::= a\nb ::= [a-z"\\]] | a{0,4}'},
    {"grammar": "root ::= [^a-z]"},
    {"grammar": "start: A\nA: /x+/"},
    {"regex": ""},
    {"regex": "a[^\\s\\S]|b"},
    {"regex": "a[^\\s\\S]*"},
    {"regex": "[^\\x00-\\U0010fffe]"},
    {"regex": "[^-a]\\\\[\\]^-]"},
    {"regex": '"[^"\\\\]*"'},
    {"json": {"type": "object", "properties": {"a": {"$ref": "#"}}}},
    {"json": {"type": "array", "items": {"$ref": "#"}}},
    {"json": {"type": "integer", "minimum": 3}},
    {"json": json.dumps({"enum": ['(="]|', "[^a"]})},
    {"structural_tag": tag(type="any_text")},
    {
        "structural_tag": tag(
            type="triggered_tags",
            triggers=["<f"],
            tags=[{"begin": "<f>", "content": {"type": "json_schema", "json_schema": {}}, "end": "</f>"}],
        )
    },
    {},
]


@pytest.mark.parametrize("form", WITHOUT, ids=str)
def test_without_a_text(form: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=r"^structured_outputs: no text satisfies this"):
        check(**form)


@pytest.mark.parametrize("form", WITH, ids=str)
def test_with_one(form: dict[str, Any]) -> None:
    check(**form)


# vLLM reads each of these without a word, and xgrammar fails when it compiles them.
UNCOMPILED: list[dict[str, Any]] = [
    {"json": {"type": "string", "minLength": -1}},
    {"json": json.dumps({"items": {"type": "string", "minLength": -1}})},
    {"structural_tag": tag(type="json_schema", json_schema={"type": "string", "minLength": -1})},
    {
        "structural_tag": json.dumps(
            {
                "structures": [{"begin": "<a>", "schema": {"type": "string", "minLength": -1}, "end": "</a>"}],
                "triggers": ["<a>"],
            }
        )
    },
]


@pytest.mark.parametrize("form", UNCOMPILED, ids=str)
def test_what_does_not_compile(form: dict[str, Any]) -> None:
    for _ in range(2):  # once from the cache
        with pytest.raises(OptionError, match=r"^structured_outputs: backend xgrammar cannot compile this: Invalid "):
            check(**form)


def test_large_schemas_compile_in_no_time() -> None:
    """They are compiled where requests are taken in; with a vocabulary of 150k tokens this one takes minutes."""
    names = {f"p{i}": {"type": "string", "maxLength": i} for i in range(1, 150)}
    satisfiable._compiler()
    start = time.monotonic()
    check(json={"type": "object", "properties": names, "required": [*names], "additionalProperties": False})
    assert time.monotonic() - start < 3  # 0.2 s


def test_other_backends_are_not_asked() -> None:
    check_satisfiable(SimpleNamespace(**{**dict.fromkeys(FORMS), "regex": NOTHING}), "guidance")


@pytest.mark.parametrize("text", ["", "root ::= Unknown(a)\na ::= ((a))\n", "root ::= ((<?))\n", "nothing at all"])
def test_what_is_not_understood_passes(text: str) -> None:
    assert is_satisfiable(text)


def test_long_chains_take_no_time() -> None:
    """In either order; a pass over all rules for each rule would take minutes."""
    rules = [f"r{i} ::= ((r{i + 1}))" for i in range(5_000)]
    for lines in (rules, rules[::-1]):
        assert is_satisfiable("\n".join(["root ::= ((r0))", *lines, 'r5000 ::= (("a"))']))
        assert not is_satisfiable("\n".join(["root ::= ((r0))", *lines, "r5000 ::= ((r0))"]))
