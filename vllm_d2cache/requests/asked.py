"""What a request asks of the plugin: its ``extra_args`` and sampling parameters, read in one place.

The front end, the scheduler and the worker are processes of their own; each reads a request for itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vllm_d2cache.options.request import CANVAS, REPORT, SNAPSHOTS, RequestOptions
from vllm_d2cache.options.server import ServerOptions
from vllm_d2cache.options.types import OptionError
from vllm_d2cache.requests.resolve import parse_request_options, resolve

HOLE = -1


@dataclass(frozen=True)
class Asked:
    """A request as it came.

    Attributes:
        settings: options that it names, parsed, by plain name.
        canvas: the canvas that it gives in part: a token id or :data:`HOLE` for each slot; () if it gives none.
        report: it wants to be told what it cost.
        snapshots: every how many steps it wants a snapshot of its canvas; 0 = never.
        constrained: its text must follow a grammar, as vLLM's own engine sees it.
    """

    settings: Mapping[str, Any]
    canvas: tuple[int, ...]
    report: bool
    snapshots: int
    constrained: bool

    @classmethod
    def of(cls, params: Any) -> Asked:
        """Read vLLM's SamplingParams.

        Raises:
            OptionError: a key of ``extra_args`` is unknown, or a value out of range.
        """
        args = params.extra_args or {}
        wanted = params.structured_outputs
        return cls(
            parse_request_options(args),
            _canvas(args.get(CANVAS)),
            _report(args.get(REPORT, False)),
            snapshot_interval(args),
            wanted is not None and not wanted.all_constraints_none(),
        )

    def options(self, server: ServerOptions) -> RequestOptions:
        """All options that decide how it is decoded.

        Raises:
            OptionError: they do not go together.
        """
        return resolve(server, self.settings, self.constrained)


def _canvas(value: Any) -> tuple[int, ...]:
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


def _report(value: Any) -> bool:
    # JSON booleans arrive as 0 and 1 through vllm_xargs.
    if value not in (0, 1) or isinstance(value, float):
        raise OptionError(f"{REPORT}: must be true or false (1 or 0), got {value!r}")
    return bool(value)


def snapshot_interval(extra_args: Mapping[str, Any] | None) -> int:
    """Every how many steps a request wants a snapshot, 0 = never: for streams, which have no SamplingParams yet.

    Raises:
        OptionError: not an integer >= 0.
    """
    value = (extra_args or {}).get(SNAPSHOTS, 0)
    if not isinstance(value, int) or value < 0:  # true is 1
        raise OptionError(f"{SNAPSHOTS}: must be an integer >= 0 (steps; 1 = every step, 0 = none), got {value!r}")
    return int(value)
