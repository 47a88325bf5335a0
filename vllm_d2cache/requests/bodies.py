"""What of a request can only be seen in the body that the client sent: vLLM's classes drop or convert it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Set
from typing import Any

from vllm_d2cache.options.request import REPORT, SNAPSHOTS
from vllm_d2cache.options.types import OptionError
from vllm_d2cache.requests.dropped_fields import check_nested, refuse_unknown

# A JSON escape of half a character, what JSON has no word for, or a field that vLLM reads in part: most bodies have
# none, and need not be read a second time.
_LOOKED_AT = re.compile(rb'\\u[dD][89a-fA-F]|NaN|Infinity|"structured_outputs"|"logit_bias"|"tools"')
# vLLM moves what lies outside to the end of the range, and takes NaN for the upper one.
_MOST_BIAS = 100.0
_FUNCTION_KEYS = frozenset({"name", "description", "parameters", "strict"})
# Part of a message -> what it is nothing without.
_PARTS = {
    "text": ("text",),
    "image": ("source",),
    "tool_use": ("id", "name"),
    "tool_result": ("tool_use_id",),
}


def check_body(route: str, body: bytes, fields: set[str], nested: Mapping[str, Set[str]]) -> None:
    """Refuse what a route would drop, or fail on.

    Args:
        route: ``completions``, ``chat``, ``batch``, ``responses`` or ``messages``.
        body: JSON, an object.
        fields: those that the route's class has; fields of other routes' classes are asked for elsewhere.
        nested: objects of which vLLM's class keeps no other keys than these.

    Raises:
        OptionError: naming the first such field.
    """
    if route not in ("batch", "messages") and not _LOOKED_AT.search(body):
        return
    content = json.loads(body)
    for field, value in content.items():
        if any(_is_broken(text) for text in _texts({field: value})):
            name = field.encode("ascii", "backslashreplace").decode()
            raise OptionError(f"{name}: has half of a surrogate pair, which is no character; send whole ones")
        if field != "logit_bias" and not all(map(math.isfinite, _numbers(value))):
            raise OptionError(f"{field}: has a number that is infinite or none; JSON has no word for these")
    for name, keys in nested.items():
        if isinstance(content.get(name), dict):
            check_nested(name, content[name], keys)
    _check_biases(content.get("logit_bias"))
    _check_tools(route, content.get("tools"))
    if route == "messages":
        refuse_unknown({name: value for name, value in content.items() if name not in fields})
        _check_messages(content)
    if route == "batch":
        _check_batch(content)


def _check_biases(biases: Any) -> None:
    for token, bias in biases.items() if isinstance(biases, dict) else ():
        number = isinstance(bias, int | float) and not isinstance(bias, bool)
        if number and not -_MOST_BIAS <= bias <= _MOST_BIAS:  # nor is NaN
            raise OptionError(f"logit_bias: must be -100 to 100, got {bias} for token {token}")


def _check_tools(route: str, tools: Any) -> None:
    """Refuse tools that nobody would call, and keys of functions that are dropped."""
    for number, tool in enumerate(tools if isinstance(tools, list) else ()):
        if not isinstance(tool, dict) or route == "messages":
            continue
        if route == "responses" and tool.get("type") != "function":
            raise OptionError(f"tools[{number}].type: must be 'function', as nothing here runs other tools; "
                              f"got {tool.get('type')!r}")  # fmt: skip
        function = tool.get("function")
        for key, value in function.items() if isinstance(function, dict) else ():
            if key not in _FUNCTION_KEYS and value is not None:
                raise OptionError(f"tools[{number}].function.{key}: has no effect here; leave it out")


def _check_messages(content: dict[str, Any]) -> None:
    """What /v1/messages would read as something else, or not at all."""
    choice = content.get("tool_choice")
    if isinstance(choice, dict) and choice.get("type") in ("any", "tool") and not content.get("tools"):
        raise OptionError(f"tool_choice: {choice['type']!r} needs tools, and the request has none; leave it out")
    turns = content.get("messages")
    named = [("system", content.get("system"))]
    named += [
        (f"messages[{number}].content", turn.get("content"))
        for number, turn in enumerate(turns if isinstance(turns, list) else ())
        if isinstance(turn, dict)
    ]
    for name, parts in named:
        for number, part in enumerate(parts if isinstance(parts, list) else ()):
            if isinstance(part, dict):
                _check_part(f"{name}[{number}]", part, name == "system")


def _check_part(name: str, part: dict[str, Any], system: bool) -> None:
    kind = part.get("type")
    if system and kind != "text":
        raise OptionError(f"{name}.type: must be 'text' in a system prompt, got {kind!r}")
    for key in _PARTS.get(kind, ()) if isinstance(kind, str) else ():
        if part.get(key) is None:
            raise OptionError(f"{name}.{key}: is missing, and a part of type {kind!r} is dropped without it")


def _check_batch(content: dict[str, Any]) -> None:
    if content.get("stream"):
        raise OptionError("stream: a batch is answered as a whole; leave it out (false)")
    xargs = content.get("vllm_xargs")
    for option in (REPORT, SNAPSHOTS):
        if isinstance(xargs, dict) and xargs.get(option):
            raise OptionError(f"{option}: is for one conversation; leave it out (0), or send them one by one")


def _texts(value: Any) -> Iterator[str]:
    """Every text in a JSON value, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from _texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)


def _numbers(value: Any) -> Iterator[float]:
    """Every number with a point in a JSON value."""
    if isinstance(value, float):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _numbers(item)


def _is_broken(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False
