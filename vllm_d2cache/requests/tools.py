"""Tools of a request that a call could not be told apart by."""

from __future__ import annotations

from typing import Any

from vllm_d2cache.options.types import OptionError


def check_tool_names(tools: Any, tool_choice: Any) -> None:
    """Refuse functions without a name, and two of one name: which of their parameters hold, a call does not say.

    Args:
        tools: a list of vLLM's objects, each with a ``function`` or with a ``name`` of its own; anything else passes.
        tool_choice: as the request has it; with "none" nothing is made of the tools.

    Raises:
        OptionError: names the function.
    """
    if tool_choice == "none" or not isinstance(tools, list):
        return
    names = [getattr(getattr(tool, "function", tool), "name", None) for tool in tools]
    if any(isinstance(name, str) and not name.strip() for name in names):
        raise OptionError("tools: a function has an empty name; a call could not name it")
    twice = next((name for name in names if name is not None and names.count(name) > 1), None)
    if twice is not None:
        raise OptionError(f"tools: {names.count(twice)} functions have the name {twice!r}; give each one its own")
