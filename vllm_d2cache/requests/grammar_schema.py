"""JSON schemas and structural tags that a grammar backend would take for something else than they say."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from vllm_d2cache.options.types import OptionError


def check_schema(schema: Any, backend: str) -> None:
    """Refuse a JSON schema with a keyword that the backend would ignore, or that leaves it nothing to write.

    Raises:
        OptionError: names it.
    """
    if backend != "xgrammar":
        return
    otherwise = 'say it otherwise, or start the server with --structured-outputs-config \'{"backend": "guidance"}\''
    for part in _schemas(json.loads(schema) if isinstance(schema, str) else schema):
        if found := next((name for name in part if name in _IGNORED), None):
            raise OptionError(
                f"structured_outputs: the JSON schema has {found!r}, which backend xgrammar would ignore (as it would "
                f"{', '.join(sorted(_IGNORED - {found}))}); {otherwise}"
            )
        named = part.get("patternProperties")
        patterns = [part.get("pattern"), *(named if isinstance(named, dict) else ())]
        if found := next((p for p in patterns if isinstance(p, str) and _CONTROL_CHARACTER.search(p)), None):
            # It would write the character itself, where JSON has its escape alone: no token may follow.
            raise OptionError(
                f"structured_outputs: the JSON schema has the pattern {found!r} with a control character, which JSON "
                "text cannot hold; say it otherwise"
            )


def _schemas(schema: Any) -> Iterator[dict[str, Any]]:
    """This schema and those inside it."""
    if isinstance(schema, list):
        for item in schema:
            yield from _schemas(item)
    elif isinstance(schema, dict):
        yield schema
        # The keys of some are names, not keywords.
        named = [list(part.values()) for name in _NAMED_SCHEMAS if isinstance(part := schema.get(name), dict)]
        yield from _schemas([*(schema.get(name) for name in _SCHEMAS), *named])


# In a regular expression: as it is, or by an escape.
_CONTROL_CHARACTER = re.compile(
    r"[\x00-\x1f]|(?<!\\)(?:\\\\)*\\(?:[tnrfv0]|x[01][0-9a-fA-F]|u00[01][0-9a-fA-F]|c[A-Za-z])"
)
_IGNORED = frozenset(
    {"not", "if", "dependentRequired", "dependentSchemas", "dependencies", "uniqueItems", "contains", "multipleOf"}
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
