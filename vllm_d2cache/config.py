"""Server-wide and per-request options: parse, check, refuse what is unknown, fill in the published defaults.

Server-wide options come from ``--additional-config '{"d2cache": {...}}'``; per-request ones from
``SamplingParams.extra_args`` (``vllm_xargs`` over HTTP) with the prefix ``d2cache_``. A request's value wins over the
server's, the server's over the defaults. Nothing here imports vLLM or torch.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

PREFIX = "d2cache_"
SECTION = "d2cache"

POLICIES = ("d2cache", "full")
SCORES = ("confidence", "margin", "entropy")
CONFIDENCE_MEMORIES = ("first", "latest")
ATTENTION_BACKENDS = ("triton", "xformers", "torch")

# Canvas length of a request that names no max_tokens (the published gen_length of most tasks).
DEFAULT_CANVAS_LENGTH = 256


class OptionError(ValueError):
    """An option is unknown or out of range. The message names the field and the valid values."""


@dataclass(frozen=True)
class _Number:
    """An int or float option within [low, high] (or (low, high] when ``open_low``)."""

    kind: type
    low: float
    high: float = math.inf
    open_low: bool = False
    note: str = ""

    def describe(self) -> str:
        noun = "an integer" if self.kind is int else "a number"
        low = f"> {self.low:g}" if self.open_low else f">= {self.low:g}"
        high = "" if self.high == math.inf else f" and <= {self.high:g}"
        return f"{noun} {low}{high}" + (f" ({self.note})" if self.note else "")

    def parse(self, value: Any) -> Any:
        if isinstance(value, bool) or not isinstance(value, int | float):
            return None
        if not abs(value) <= sys.float_info.max:  # NaN, infinity, or an int that no float can hold
            return None
        if self.kind is int and value != int(value):
            return None
        if value > self.high or value < self.low or (self.open_low and value == self.low):
            return None
        return self.kind(value)


@dataclass(frozen=True)
class _Choice:
    """A string option out of a fixed list."""

    values: tuple[str, ...]

    def describe(self) -> str:
        return "one of " + ", ".join(repr(v) for v in self.values)

    def parse(self, value: Any) -> Any:
        return value if isinstance(value, str) and value in self.values else None


REQUEST_FIELDS: dict[str, _Number | _Choice] = {
    "policy": _Choice(POLICIES),
    "window": _Number(int, 0, note="positions; 0 = the whole canvas"),
    "tokens_per_step": _Number(int, 1),
    "threshold": _Number(float, 0, 1, note="0 = off"),
    "factor": _Number(float, 0, note="0 = off"),
    "score": _Choice(SCORES),
    "sigma": _Number(float, 0, note="positions; 0 = no certainty prior"),
    "selection_sigma": _Number(float, 0, note="positions; 0 = rank by confidence alone"),
    "current_k": _Number(int, 1),
    "rollout_p": _Number(float, 0, 1),
    "inflate_w": _Number(int, 0),
    "confidence_memory": _Choice(CONFIDENCE_MEMORIES),
    "confidence_top_p": _Number(float, 0, 1, open_low=True, note="1 = off"),
}
SERVER_ONLY_FIELDS = ("trace_dir", "refresh_budget", "attention_backend")
_BUDGET = _Number(int, 1, note="rows per request and step")
_BACKEND = _Choice(ATTENTION_BACKENDS)


@dataclass(frozen=True)
class RequestOptions:
    """Everything that decides how one request is decoded and cached.

    Attributes:
        policy: cache policy, one of :data:`POLICIES`.
        window: positions in which tokens may be committed at a time, left to right; 0 = the whole canvas.
        tokens_per_step: tokens committed in a step, at least.
        threshold: commit every candidate whose score reaches it; 0 = off (d2cache.md, section 4).
        factor: commit as many as the factor rule of section 4 allows; 0 = off.
        score: which statistic ranks candidates, one of :data:`SCORES`.
        sigma: width in positions of the certainty prior when committing; 0 = off (section 3.2).
        selection_sigma: the same when choosing which masked positions to refresh (section 3.3).
        current_k: masked positions refreshed a step.
        rollout_p: attention-rollout mass refreshed a step (section 3.5).
        inflate_w: gaps up to this many positions between refreshed positions are refreshed too; 0 = off.
        confidence_memory: ``first`` ranks masked positions by their confidence in the first step, as published;
            ``latest`` by their most recent one, as the paper describes (section 3.7).
        confidence_top_p: nucleus filter on the vocabulary before confidences are taken; 1 = off.
    """

    policy: str = "d2cache"
    window: int = 0
    tokens_per_step: int = 1
    threshold: float = 0.0
    factor: float = 0.0
    score: str = "confidence"
    sigma: float = 10.0
    selection_sigma: float = 10.0
    current_k: int = 32
    rollout_p: float = 0.1
    inflate_w: int = 0
    confidence_memory: str = "first"
    confidence_top_p: float = 1.0

    @property
    def commits_many(self) -> bool:
        """Whether a step may commit more than ``tokens_per_step`` tokens."""
        return self.threshold > 0 or self.factor > 0

    def window_length(self, canvas_length: int) -> int:
        """Window length in positions for a canvas of ``canvas_length``."""
        return min(self.window, canvas_length) if self.window else canvas_length


# What the published scripts use when several tokens are committed in a step (d2cache.md, section 10).
_PARALLEL_DEFAULTS = {"window": 32, "inflate_w": 4, "sigma": 0.0}


@dataclass(frozen=True)
class ServerOptions:
    """Server-wide options. ``request_defaults`` holds only what the operator set.

    Attributes:
        trace_dir: directory for per-request traces; None = off.
        refresh_budget: rows a request may recompute in a step after its first; None = as many as its policy
            asks for. What does not fit waits for the next step, which makes results approximate.
        attention_backend: what computes on a GPU, one of :data:`ATTENTION_BACKENDS`; None = triton there, torch on CPU.
    """

    request_defaults: Mapping[str, Any]
    trace_dir: str | None = None
    refresh_budget: int | None = None
    attention_backend: str | None = None

    def resolve(self, request: Mapping[str, Any]) -> RequestOptions:
        """Options of one request from its own settings (already parsed) over the server's over the defaults."""
        chosen = dict(self.request_defaults)
        # A request that picks one of the two parallel rules drops the server's choice of the other.
        for name, other in (("threshold", "factor"), ("factor", "threshold")):
            if request.get(name, 0) > 0 and other not in request:
                chosen.pop(other, None)
        chosen.update(request)
        if chosen.get("threshold", 0) > 0 and chosen.get("factor", 0) > 0:
            raise OptionError(
                "threshold and factor are alternatives: give one (in a request d2cache_threshold or d2cache_factor)"
            )
        if chosen.get("threshold", 0) > 0 or chosen.get("factor", 0) > 0:
            chosen = {**_PARALLEL_DEFAULTS, **chosen}
        return RequestOptions(**chosen)


def _parse_field(name: str, label: str, value: Any) -> Any:
    spec = REQUEST_FIELDS[name]
    parsed = spec.parse(value)
    if parsed is None:
        raise OptionError(f"{label}: must be {spec.describe()}, got {value!r}")
    return parsed


def parse_server_options(raw: Mapping[str, Any] | None) -> ServerOptions:
    """Server-wide options from ``additional_config["d2cache"]``.

    Raises:
        OptionError: unknown key or value out of range.
    """
    if raw is not None and not isinstance(raw, Mapping):
        raise OptionError(f'additional_config["{SECTION}"]: must be an object, got {raw!r}')
    defaults: dict[str, Any] = {}
    trace_dir, budget, backend = None, None, None
    for name, value in (raw or {}).items():
        label = f'additional_config["{SECTION}"]["{name}"]'
        if name in REQUEST_FIELDS:
            defaults[name] = _parse_field(name, label, value)
        elif name == "trace_dir":
            if value is not None and not (isinstance(value, str) and value):
                raise OptionError(f"{label}: must be a directory name, got {value!r}")
            trace_dir = value
        elif name == "refresh_budget":
            budget = None if value is None else _BUDGET.parse(value)
            if value is not None and budget is None:
                raise OptionError(f"{label}: must be {_BUDGET.describe()}, got {value!r}")
        elif name == "attention_backend":
            backend = None if value is None else _BACKEND.parse(value)
            if value is not None and backend is None:
                raise OptionError(f"{label}: must be {_BACKEND.describe()}, got {value!r}")
        else:
            valid = ", ".join([*REQUEST_FIELDS, *SERVER_ONLY_FIELDS])
            raise OptionError(f"{label}: unknown option; valid options are {valid}")
    options = ServerOptions(defaults, trace_dir, budget, backend)
    options.resolve({})
    return options


def parse_request_options(extra_args: Mapping[str, Any] | None) -> dict[str, Any]:
    """The options a request sets itself, by plain name, from its ``extra_args``.

    Raises:
        OptionError: unknown key or value out of range.
    """
    parsed: dict[str, Any] = {}
    for key, value in (extra_args or {}).items():
        name = str(key).removeprefix(PREFIX)
        if not str(key).startswith(PREFIX) or name not in REQUEST_FIELDS:
            hint = f"; {key!r} is set server-wide only" if name in SERVER_ONLY_FIELDS else ""
            valid = ", ".join(PREFIX + n for n in REQUEST_FIELDS)
            raise OptionError(f"{key}: unknown request option{hint}; valid options are {valid}")
        parsed[name] = _parse_field(name, key, value)
    return parsed


assert set(REQUEST_FIELDS) == {f.name for f in fields(RequestOptions)}
