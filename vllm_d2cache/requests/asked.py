"""A canvas that the request gives in part: fixed tokens and holes, ``d2cache_canvas``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm_d2cache.options.server import CANVAS, OptionError

HOLE = -1


def parse_canvas(extra_args: Mapping[str, Any] | None) -> tuple[int, ...]:
    """The canvas a request gives: a token id or :data:`HOLE` for each slot; () if it gives none.

    Raises:
        OptionError: not a list of token ids and holes, or without a hole.
    """
    value = (extra_args or {}).get(CANVAS)
    if value is None:
        return ()
    kinds = "a list of token ids (integers >= 0) and holes (-1, or null where JSON null is let through)"
    if not isinstance(value, list | tuple):
        raise OptionError(f"{CANVAS}: must be {kinds}, got {value!r}")
    slots = [HOLE if item is None else item for item in value]
    for place, item in enumerate(slots):
        if isinstance(item, bool) or not isinstance(item, int) or item < HOLE:
            raise OptionError(f"{CANVAS}: must be {kinds}, got {item!r} in slot {place}")
    if HOLE not in slots:
        raise OptionError(f"{CANVAS}: must have at least one hole (-1)")
    return tuple(slots)
