"""Grammars that no text satisfies: refused where they are asked for, as nobody could answer them.

xgrammar takes such a grammar, and a request would end in its first or a later step with nothing that may follow. What
it has read of a regex, a schema or a grammar is asked here, in the notation that it prints.
"""

from __future__ import annotations

import functools
import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

from vllm_d2cache.options.types import OptionError

# Elements of a rule: text, a class of characters (with a star or without), the beginning of a look-ahead, brackets and
# bars, and the name of a rule with how often it stands.
_ELEMENT = re.compile(
    r'\s*(?:(?P<text>"(?:[^"\\]|\\.)*")|(?P<chars>\[\^?(?:[^\]\\]|\\.)*\])(?P<star>\*?)|(?P<ahead>\(=)|(?P<mark>[()|])'
    r"|(?P<name>\w[\w.-]*)(?:\{(?P<least>\d+), -?\d+\})?)",
    re.DOTALL,
)
_RULE = re.compile(r"^(\S+) ::= ", re.MULTILINE)
_ESCAPES = {"n": 10, "r": 13, "t": 9, "f": 12, "v": 11, "b": 8, "a": 7, "e": 27, "0": 0}
_CODE = re.compile(r"\\(?:x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|(.))|(.)", re.DOTALL)
_LAST_CHARACTER = 0x10FFFF


def check_satisfiable(wanted: Any, backend: str) -> None:
    """Refuse a grammar that has no text, or that the backend cannot compile.

    Args:
        wanted: vLLM's StructuredOutputsParams, checked by vLLM, which reads a grammar and does not compile it.

    Raises:
        OptionError: nothing satisfies it, or the engine would fail on it.
    """
    if backend != "xgrammar":
        return
    for kind in _READERS:
        if value := getattr(wanted, kind):
            fault = _fault(kind, value if isinstance(value, str) else json.dumps(value))
            if fault is not None:
                raise OptionError(f"structured_outputs: {fault}")


def is_satisfiable(grammar: str) -> bool:
    """Whether some text follows a grammar as xgrammar prints it; true where a part of it is not understood."""
    ends = _RULE.split(grammar)[1:]
    rules: dict[str, Any] = {}
    for name, body in zip(ends[::2], ends[1::2], strict=True):
        try:
            rules[name] = _Reader(body).choice()
        except (ValueError, RecursionError):
            rules[name] = True
    users = defaultdict(set)  # of a rule: the rules that name it
    for name, body in rules.items():
        for used in _named(body):
            users[used].add(name)
    written: set[str] = set()
    waiting = list(rules)
    while waiting:
        name = waiting.pop()
        if name not in written and _can_be_written(rules[name], written, rules):
            written.add(name)
            waiting.extend(users[name])
    return "root" in written or "root" not in rules


@functools.lru_cache(maxsize=64)  # some routes have a request checked twice
def _fault(kind: str, text: str) -> str | None:
    """Why a grammar cannot be followed; None if it can."""
    try:
        grammar = _READERS[kind](text)
        _compiler().compile_grammar(grammar)
    except (RuntimeError, TypeError, ValueError, AttributeError, KeyError) as error:
        return f"backend xgrammar cannot compile this: {_PLACE.sub('', str(error)).strip()[:200]}"
    return None if is_satisfiable(str(grammar)) else "no text satisfies this; nothing could be written"


@functools.cache
def _compiler() -> Any:
    """A compiler for an empty vocabulary: what compiles does not depend on it, how long it takes does, by thousands."""
    from xgrammar import GrammarCompiler, TokenizerInfo

    return GrammarCompiler(TokenizerInfo([], stop_token_ids=[]), max_threads=1, cache_enabled=False)


def _of_schema(text: str) -> Any:
    from xgrammar import Grammar

    # As vLLM's backend compiles it where JSON has no spare whitespace, which the config hook sees to.
    return Grammar.from_json_schema(text, any_whitespace=False, separators=(",", ":"))


def _of_regex(text: str) -> Any:
    from xgrammar import Grammar

    return Grammar.from_regex(text)


def _of_grammar(text: str) -> Any:
    from xgrammar import Grammar

    try:
        return Grammar.from_ebnf(text)
    except RuntimeError:
        return Grammar.from_lark(text)


def _of_structural_tag(text: str) -> Any:
    from xgrammar import Grammar, StructuralTagItem

    tag = json.loads(text)
    if "structures" not in tag:
        return Grammar.from_structural_tag(text)
    items = [
        StructuralTagItem(begin=part["begin"], schema=json.dumps(part["schema"]), end=part["end"])
        for part in tag["structures"]
    ]
    return Grammar.from_structural_tag(items, tag["triggers"])


# Field of StructuredOutputsParams -> what xgrammar reads in it. vLLM makes a grammar of the field "choice".
_READERS: dict[str, Callable[[str], Any]] = {
    "regex": _of_regex,
    "json": _of_schema,
    "grammar": _of_grammar,
    "structural_tag": _of_structural_tag,
}
# What its errors begin with: the time, and a line of its source.
_PLACE = re.compile(r"^\[[\d:]+\] \S+:\d+: (?:Check failed: .* is false: )?")


class _Reader:
    """Reads the body of a rule: a bool, the name of a rule, ("all", parts) or ("any", parts)."""

    def __init__(self, text: str) -> None:
        self.text, self.place = text.rstrip(), 0

    def next(self) -> re.Match[str] | None:
        """The next element; None at the end."""
        if self.place == len(self.text):
            return None
        found = _ELEMENT.match(self.text, self.place)
        if found is None:
            raise ValueError(self.text[self.place :])
        self.place = found.end()
        return found

    def choice(self) -> Any:
        """Alternatives up to a closing bracket or the end."""
        alternatives: list[Any] = []
        parts: list[Any] = []
        while (element := self.next()) is not None and element["mark"] != ")":
            if element["mark"] == "|":
                alternatives.append(("all", parts))
                parts = []
            else:
                parts.append(self.part(element))
        return ("any", [*alternatives, ("all", parts)])

    def part(self, element: re.Match[str]) -> Any:
        """One element, and what belongs to it."""
        if element["mark"] == "(":
            return self.choice()
        if element["ahead"]:
            self.choice()
            return True
        if element["text"]:
            return True
        if element["chars"]:
            return bool(element["star"]) or _has_a_character(element["chars"])
        if self.text[self.place : self.place + 1] == "(":  # a form that is not known here
            raise ValueError(element["name"])
        return True if element["least"] == "0" else element["name"]


def _named(body: Any) -> Iterator[str]:
    if isinstance(body, str):
        yield body
    elif isinstance(body, tuple):
        for part in body[1]:
            yield from _named(part)


def _can_be_written(body: Any, written: set[str], rules: dict[str, Any]) -> bool:
    if isinstance(body, bool):
        return body
    if isinstance(body, str):
        return body in written or body not in rules
    kind, parts = body
    return (all if kind == "all" else any)(_can_be_written(part, written, rules) for part in parts)


def _has_a_character(chars: str) -> bool:
    """Whether a class of characters has one: such as is not everything, negated."""
    if not chars.startswith("[^"):
        return True
    codes: list[int | None] = []  # None is the dash of a range
    for code in _CODE.finditer(chars, 2, len(chars) - 1):
        digits = next((group for group in code.group(1, 2, 3) if group), None)
        if digits:
            codes.append(int(digits, 16))
        elif code[4]:
            codes.append(_ESCAPES.get(code[4], ord(code[4])))
        else:
            codes.append(None if code[5] == "-" else ord(code[5]))
    ranges, place = [], 0
    while place < len(codes):
        low = codes[place]
        if place + 2 < len(codes) and codes[place + 1] is None and low is not None:
            ranges.append((low, codes[place + 2] or ord("-")))
            place += 3
        else:
            ranges.append((ord("-") if low is None else low,) * 2)
            place += 1
    reached = 0
    for low, high in sorted(ranges):
        if low > reached:
            return True
        reached = max(reached, high + 1)
    return reached <= _LAST_CHARACTER
