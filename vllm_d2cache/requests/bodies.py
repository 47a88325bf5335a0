"""What of a request can only be seen in the body that the client sent: vLLM's classes drop or convert it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Set
from typing import Any

from vllm_d2cache.options.request import REPORT, SNAPSHOTS
from vllm_d2cache.options.types import OptionError
from vllm_d2cache.requests.dropped_fields import check_nested, refuse_unknown

# A JSON escape of half a character, or an object that vLLM reads in part: most bodies have none, and need not be read a
# second time.
_LOOKED_AT = re.compile(rb'\\u[dD][89a-fA-F]|"structured_outputs"')


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
    for name, keys in nested.items():
        if isinstance(content.get(name), dict):
            check_nested(name, content[name], keys)
    if route == "messages":
        refuse_unknown({name: value for name, value in content.items() if name not in fields})
    if route == "batch":
        _check_batch(content)


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


def _is_broken(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False
