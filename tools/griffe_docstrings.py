"""For the documentation site: what its docstrings have that griffe does not read (mkdocs.yml names this file).

Names marked up as in Sphinx, :func:`row_stats`, become plain code; arguments described together, "key, value: ...",
are described one by one; the comments beside a record's fields, and above them, are their descriptions.
"""

from __future__ import annotations

import re
from typing import Any

from griffe import Attribute, Docstring, Extension, Object

_ROLE = re.compile(r":[a-z]+:`~?([^`]+)`")
_BESIDE = re.compile(r"  # (.*)$")
_TOGETHER = re.compile(r"^(?P<indent> +)(?P<names>\*?\w+(?:, \*?\w+)+):(?P<text> .*)$")


def without_roles(text: str) -> str:
    """The text with ``:func:`name``` as ```name```."""
    return _ROLE.sub(r"`\1`", text)


def one_by_one(text: str) -> str:
    """The text with each line "a, b: ..." (and the deeper ones behind it) once for ``a`` and once for ``b``."""
    lines, out, i = text.split("\n"), [], 0
    while i < len(lines):
        match, i = _TOGETHER.match(lines[i]), i + 1
        if match is None:
            out.append(lines[i - 1])
            continue
        begin, deeper = i, match["indent"] + " "
        while i < len(lines) and lines[i].startswith(deeper):
            i += 1
        for name in match["names"].split(", "):
            out += [f"{match['indent']}{name}:{match['text']}", *lines[begin:i]]
    return "\n".join(out)


def comment_of(lines: list[str], first: int, last: int) -> str:
    """The comment of a statement: the lines above it that are nothing else, and what stands beside its end.

    Args:
        lines: the source's.
        first: number of the statement's first line, from 1.
        last: number of its last.
    """
    indent = re.match(" *", lines[first - 1])[0]  # type: ignore[index]
    above: list[str] = []
    for line in reversed(lines[: first - 1]):
        if not line.startswith(f"{indent}# "):
            break
        above.insert(0, line.strip(" #"))
    beside = _BESIDE.search(lines[last - 1])
    return " ".join([*above, *([beside[1]] if beside else [])])


class Docstrings(Extension):
    """Changes docstrings as they are read."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Called for every module, class, function and attribute."""
        if obj.docstring is not None:
            obj.docstring.value = one_by_one(without_roles(obj.docstring.value))

    def on_attribute(self, *, attr: Attribute, **_: Any) -> None:
        """Called for every field and constant."""
        in_class = attr.parent is not None and attr.parent.is_class
        if in_class and attr.docstring is None and attr.lineno and attr.endlineno:
            text = comment_of(attr.lines_collection[attr.filepath], attr.lineno, attr.endlineno)
            if text:
                attr.docstring = Docstring(text, lineno=attr.lineno, endlineno=attr.endlineno, parent=attr)
