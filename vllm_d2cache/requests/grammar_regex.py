"""Regular expressions that backend xgrammar takes for something else than they say."""

from __future__ import annotations

import re
from collections.abc import Iterable

from vllm_d2cache.options.types import OptionError

# Parts of an expression: escapes, classes of characters, brackets, bars, anchors, repetitions, and any other character.
_PART = re.compile(
    r"(?P<escape>\\.)|(?P<chars>\[\^?(?:[^\]\\]|\\.)*\])|(?P<around>\(\?<?[=!])|(?P<open>\((?:\?(?:P?<\w+>|[\w-]*:))?)"
    r"|(?P<close>\))|(?P<bar>\|)|(?P<begin>\^)|(?P<end>\$)|(?P<optional>\?)|(?P<many>[*+]|\{\d+(?:,\d*)?\})|(?P<other>.)",
    re.DOTALL,
)
# A letter or a digit behind a backslash that xgrammar reads as nobody else does: mostly as itself. Those that it
# refuses (\b, \1, \p) are left to it.
_LITERAL_ESCAPE = re.compile(
    r"\\(?:\\|x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|u\{[0-9a-fA-F]+\}|U[0-9a-fA-F]{8}|c[A-Za-z]|0(?![0-9])"
    r"|[^A-Za-z0-9]|[dDwWsStnrfvaebBpPk1-9]|(?P<literal>.))",
    re.DOTALL,
)
_POSIX_CLASS = re.compile(r"\[([:.=])\^?\w+\1\]$")
_Part = tuple[str, str]  # its kind, a name of a group of _PART, and its text


def check_regex(pattern: str, what: str) -> None:
    """Refuse a regular expression with a part that xgrammar would drop, or take literally.

    Args:
        pattern: as the request has it.
        what: what the request calls it.

    Raises:
        OptionError: names the part.
    """
    if found := next((e["literal"] for e in _LITERAL_ESCAPE.finditer(pattern) if e["literal"]), None):
        raise _refusal(what, rf"\{found}", "would read literally")
    parts = [(part.lastgroup or "other", part[0]) for part in _PART.finditer(pattern)]
    for kind, text in parts:
        if kind == "around":
            raise _refusal(what, f"{text}...)", "would ignore")
        if kind == "chars" and (posix := _POSIX_CLASS.search(text, 1)):
            raise _refusal(what, posix[0], "would read character by character")
    backwards = [({"open": "close", "close": "open"}.get(kind, kind), text) for kind, text in reversed(parts)]
    for anchor, sign, direction in (("begin", "^", parts), ("end", "$", backwards)):
        if _within(anchor, direction) or _repeated(anchor, backwards):
            raise _refusal(what, sign, "would ignore where it is not at an end")


def _refusal(what: str, part: str, does: str) -> OptionError:
    return OptionError(
        f"structured_outputs: the {what} has {part!r}, which backend xgrammar {does}; a text fits as a whole, without "
        "anchors; say the rest otherwise, as [a-z] and the like"
    )


def _within(anchor: str, parts: Iterable[_Part]) -> bool:
    """Whether something stands before an anchor in its alternative, or in one around it."""
    first = True  # nothing has stood here so far
    outer: list[bool] = [True]
    for kind, _ in parts:
        if kind == anchor:
            if not first:
                return True
        elif kind == "open":
            outer.append(first)
        elif kind == "bar":
            first = outer[-1]
        elif kind == "close":
            first = False
            outer = outer[:-1] or [True]
        elif kind != "optional":
            first = False
    return False


def _repeated(anchor: str, backwards: Iterable[_Part]) -> bool:
    """Whether an anchor stands in brackets that may come more than once, of parts from the last to the first."""
    repeated = many = False
    outer: list[bool] = []
    for kind, _ in backwards:
        if kind == anchor and repeated:
            return True
        if kind == "open":
            outer.append(repeated)
            repeated = repeated or many
        elif kind == "close" and outer:
            repeated = outer.pop()
        if kind != "optional":
            many = kind == "many"
    return False
