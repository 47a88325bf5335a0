"""Tools whose names do not tell them apart."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from vllm_d2cache.options.types import OptionError
from vllm_d2cache.requests.tools import check_tool_names


def tools(*names: str) -> list[Any]:
    """As chats have them."""
    return [SimpleNamespace(type="function", function=SimpleNamespace(name=name)) for name in names]


def flat(*names: str) -> list[Any]:
    """As /v1/responses has them, and one that is no function."""
    return [SimpleNamespace(type="web_search"), *(SimpleNamespace(type="function", name=name) for name in names)]


@pytest.mark.parametrize("made", [tools, flat])
@pytest.mark.parametrize("choice", ["required", "auto", None, SimpleNamespace(type="function")])
def test_names_that_say_nothing(made: Any, choice: Any) -> None:
    with pytest.raises(OptionError, match=r"^tools: 2 functions have the name 'f'"):
        check_tool_names(made("f", "g", "f"), choice)
    for empty in ("", " "):
        with pytest.raises(OptionError, match=r"^tools: a function has an empty name"):
            check_tool_names(made("f", empty), choice)
    check_tool_names(made("f", "g"), choice)


def test_what_nobody_calls_passes() -> None:
    check_tool_names(tools("f", "f", ""), "none")
    for nothing in (None, [], [SimpleNamespace(type="web_search")] * 2):
        check_tool_names(nothing, "auto")
