"""Random constraints, and whether a text keeps to them by the word of others: re, json and jsonschema."""

from __future__ import annotations

import json
import random
import re
import string
from dataclasses import dataclass
from typing import Any

import jsonschema


@dataclass(frozen=True)
class Constraint:
    """``kind`` is a field of vLLM's StructuredOutputsParams, ``value`` what stands in it."""

    kind: str
    value: Any

    def fits(self, text: str) -> bool:
        """Whether the whole text is one that the constraint allows."""
        if self.kind == "choice":
            return text in self.value
        if self.kind == "regex":
            return re.fullmatch(self.value, text) is not None
        if self.kind == "grammar":
            return re.fullmatch("(a[bc]+)(;a[bc]+)*", text) is not None
        try:
            read = json.loads(text)
        except json.JSONDecodeError:
            return False
        if self.kind == "json_object":
            return isinstance(read, dict)
        return jsonschema.Draft202012Validator(self.value).is_valid(read)


LIST_GRAMMAR = 'root ::= word (";" word)*\nword ::= "a" ("b" | "c")+'


def random_constraint(rng: random.Random) -> Constraint:
    """Any kind; texts are short enough to end in a canvas of about 100."""
    kind = rng.choice(["choice", "regex", "json", "json", "grammar", "json_object"])
    if kind == "choice":
        return Constraint(kind, [_word(rng, 12) for _ in range(rng.randint(1, 6))])
    if kind == "regex":
        return Constraint(kind, _regex(rng, 2))
    if kind == "json":
        return Constraint(kind, _object(rng, 2))
    return Constraint(kind, LIST_GRAMMAR if kind == "grammar" else True)


def _word(rng: random.Random, longest: int) -> str:
    letters = string.ascii_letters + string.digits + " .,-_äß€"
    return "".join(rng.choice(letters) for _ in range(rng.randint(1, longest)))


def _regex(rng: random.Random, depth: int) -> str:
    parts = []
    for _ in range(rng.randint(1, 3)):
        if depth and rng.random() < 0.4:
            part = f"({_regex(rng, depth - 1)}|{_regex(rng, depth - 1)})"
        else:
            part = rng.choice(["[a-f]", "[A-Z0-9]", r"\d", "x", "[^a-y]", "ab"])
            part = f"({part})" if len(part) == 2 and part != r"\d" else part
        parts.append(part + rng.choice(["", "", "?", "{1,3}", "{2}", "{0,2}"]))
    return "".join(parts)


def _object(rng: random.Random, depth: int) -> dict[str, Any]:
    names = [f"{rng.choice('abcxyz')}{i}" for i in range(rng.randint(1, 3))]
    return {
        "type": "object",
        "properties": {name: _value(rng, depth - 1) for name in names},
        "required": names if rng.random() < 0.7 else names[:1],
        "additionalProperties": False,
    }


def _value(rng: random.Random, depth: int) -> dict[str, Any]:
    kinds = ["string", "integer", "boolean", "enum", "null"] + (["object", "array"] if depth > 0 else [])
    kind = rng.choice(kinds)
    if kind == "string":
        return {"type": "string", "maxLength": rng.randint(1, 6)}
    if kind == "integer":
        return {"type": "integer", "minimum": rng.randint(-5, 0), "maximum": rng.randint(1, 999)}
    if kind == "enum":
        return {"enum": [_word(rng, 4), rng.randint(0, 9), True]}
    if kind == "object":
        return _object(rng, depth)
    if kind == "array":
        return {"type": "array", "items": _value(rng, depth - 1), "minItems": 1, "maxItems": rng.randint(1, 3)}
    return {"type": kind}
