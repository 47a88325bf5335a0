"""JSON schemas and structural tags that a grammar backend would take for something else than they say."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from vllm_d2cache.options.types import OptionError
from vllm_d2cache.requests.grammar_regex import check_regex


def check_schema(schema: Any, backend: str) -> None:
    """Refuse a JSON schema with a keyword that the backend would not keep, or that leaves it nothing to write.

    Args:
        schema: a schema, or the text of one.
        backend: the server's; nothing is asked of another one than xgrammar, which say themselves what they cannot do.

    Raises:
        OptionError: names it.
    """
    if backend != "xgrammar":
        return
    for part in _schemas(json.loads(schema) if isinstance(schema, str) else schema):
        for fault in (_ignored, _without_choice, _wrong_bound, _unknown_reference, _not_required, _lost_number):
            if found := fault(part):
                raise OptionError(f"structured_outputs: the JSON schema has {found}")
        _check_patterns(part)


def check_structural_tag(structural_tag: str, backend: str) -> None:
    """The same for all schemas and regular expressions of a structural tag, in either of its forms.

    Raises:
        OptionError: names what is not kept.
    """
    tag = json.loads(structural_tag)
    if backend != "xgrammar" or not isinstance(tag, dict):
        return
    older = tag.get("structures")
    for structure in older if isinstance(older, list) else ():
        check_schema(structure.get("schema"), backend)
    for part in _formats(tag.get("format")):
        if "json_schema" in part:
            check_schema(part["json_schema"], backend)
        elif part.get("type") == "regex" and isinstance(part.get("pattern"), str):
            check_regex(part["pattern"], "regex")


def _formats(value: Any) -> Iterator[dict[str, Any]]:
    """The parts of a structural tag's format, without what is inside of a schema."""
    if isinstance(value, list):
        for item in value:
            yield from _formats(item)
    elif isinstance(value, dict):
        yield value
        if "json_schema" not in value:
            yield from _formats(list(value.values()))


def _schemas(root: Any) -> Iterator[dict[str, Any]]:
    """This schema, those inside it, and those that it refers to wherever they stand in it."""
    waiting, seen = [root], set()
    while waiting:
        schema = waiting.pop()
        if isinstance(schema, list):
            waiting += reversed(schema)
        elif isinstance(schema, dict) and id(schema) not in seen:
            seen.add(id(schema))
            yield schema
            # The keys of some are names, not keywords.
            named = [list(part.values()) for name in _NAMED_SCHEMAS if isinstance(part := schema.get(name), dict)]
            waiting += [_referred(schema.get("$ref"), root), *named, *(schema.get(name) for name in _SCHEMAS)]


def _referred(reference: Any, root: Any) -> Any:
    """What a JSON pointer from the root names; None for anything else."""
    if not isinstance(reference, str) or not reference.startswith("#/"):
        return None
    found = root
    for name in reference[2:].split("/"):
        found = found.get(name) if isinstance(found, dict) else None
    return found


def _ignored(part: dict[str, Any]) -> str | None:
    found = next((name for name in part if name in _IGNORED), None)
    return found and (
        f"{found!r}, which backend xgrammar would ignore (as it would {', '.join(sorted(_IGNORED - {found}))}); "
        f"{_OTHERWISE}"
    )


def _without_choice(part: dict[str, Any]) -> str | None:
    """Without one, xgrammar writes nothing at all, or anything."""
    found = next((name for name in ("anyOf", "oneOf", "allOf", "enum", "type") if part.get(name) == []), None)
    return found and f"an empty {found!r}; it needs one entry at least"


def _wrong_bound(part: dict[str, Any]) -> str | None:
    """Bounds of lengths and numbers: xgrammar ignores some wrong ones, and fails on others when it compiles."""
    for name in ("Length", "Items", "Properties"):
        bounds = [(key, part[key]) for key in (f"min{name}", f"max{name}") if key in part]
        for key, bound in bounds:
            if isinstance(bound, bool) or not isinstance(bound, int) or bound < 0:
                return f"{key!r} {bound!r}; it must be an integer >= 0"
        if len(bounds) == 2 and bounds[0][1] > bounds[1][1]:
            return f"'min{name}' {bounds[0][1]} above 'max{name}' {bounds[1][1]}; nothing could be written"
    return None


def _unknown_reference(part: dict[str, Any]) -> str | None:
    reference = part.get("$ref", "#")
    if isinstance(reference, str) and (reference == "#" or reference.startswith("#/")):
        return None
    return (
        "a '$ref' that is no path from its root (# or #/...), which backend xgrammar would ignore; put the schema into "
        "$defs and refer to it there"
    )


def _not_required(part: dict[str, Any]) -> str | None:
    """xgrammar asks for names that stand in ``properties``, and forgets others."""
    required, kinds = part.get("required", []), part.get("type", "object")
    if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
        return "a 'required' that is no list of names"
    if kinds != "object" and not (isinstance(kinds, list) and "object" in kinds):
        return None
    properties = part.get("properties")
    known = properties if isinstance(properties, dict) else {}
    found = next((name for name in required if name not in known), None)
    return (
        None
        if found is None
        else (
            f"{found!r} in 'required' but not in the 'properties' beside it: backend xgrammar would not ask for it; "
            f"give it a schema there (true allows anything), or {_OTHERWISE}"
        )
    )


def _lost_number(part: dict[str, Any]) -> str | None:
    """An integer beyond 64 bits, which xgrammar reads as a float; floats come back as they are."""
    waiting = [part.get("const"), part.get("enum")]
    while waiting:
        value = waiting.pop()
        if isinstance(value, list):
            waiting += value
        elif isinstance(value, dict):
            waiting += value.values()
        elif isinstance(value, int) and not -(2**63) <= value < 2**63 and not _is_float(value):
            return f"the number {value} in 'const' or 'enum', which backend xgrammar would round; write it as a string"
    return None


def _is_float(number: int) -> bool:
    """Whether it comes back from the 17 digits that xgrammar prints of a float."""
    try:
        return float(f"{float(number):.17g}") == number
    except OverflowError:
        return False


def _check_patterns(part: dict[str, Any]) -> None:
    pattern, named = part.get("pattern"), part.get("patternProperties")
    if isinstance(pattern, str) and "format" in part:
        raise OptionError(
            "structured_outputs: the JSON schema has 'pattern' beside 'format', where backend xgrammar would ignore "
            f"the pattern; leave out one of them, or {_OTHERWISE}"
        )
    for found in [pattern, *(named if isinstance(named, dict) else ())]:
        if not isinstance(found, str):
            continue
        if _CONTROL_CHARACTER.search(found):
            # It would write the character itself, where JSON has its escape alone: no token may follow.
            raise OptionError(
                f"structured_outputs: the JSON schema has the pattern {found!r} with a control character, which JSON "
                "text cannot hold; say it otherwise"
            )
        check_regex(found, "JSON schema's pattern")


_OTHERWISE = 'say it otherwise, or start the server with --structured-outputs-config \'{"backend": "guidance"}\''
# In a regular expression: as it is, or by an escape.
_CONTROL_CHARACTER = re.compile(
    r"[\x00-\x1f]|(?<!\\)(?:\\\\)*\\(?:[tnrfvae0]|x[01][0-9a-fA-F]|u00[01][0-9a-fA-F]|u\{0*[01]?[0-9a-fA-F]\}|c[A-Za-z])"
)
_IGNORED = frozenset(
    {
        *("not", "if", "dependentRequired", "dependentSchemas", "dependencies", "uniqueItems", "contains"),
        *("multipleOf", "$dynamicRef", "$recursiveRef"),
    }
)
_SCHEMAS = (
    *("items", "prefixItems", "unevaluatedItems", "additionalProperties", "unevaluatedProperties", "propertyNames"),
    *("anyOf", "oneOf", "allOf"),
)
_NAMED_SCHEMAS = ("properties", "patternProperties", "$defs", "definitions")


def without_spare_whitespace(structural_tag: str) -> str:
    """The same with one character of whitespace at most between the parts of its JSON, where it says nothing else.

    For backend xgrammar. The older form of structural tags cannot say it, and stays as it is.
    """
    tag = json.loads(structural_tag)
    if "structures" in tag:
        return structural_tag
    _limit_whitespace(tag)
    return json.dumps(tag)


def _limit_whitespace(tag: Any) -> None:
    parts = tag if isinstance(tag, list) else [tag] if isinstance(tag, dict) else []
    for part in parts:
        if isinstance(part, dict) and part.get("type") == "json_schema":
            # vLLM's tool parsers leave a null here, which means without end.
            if part.get("max_whitespace_cnt") is None:
                part["max_whitespace_cnt"] = 1
        elif isinstance(part, dict):
            for value in part.values():
                _limit_whitespace(value)
