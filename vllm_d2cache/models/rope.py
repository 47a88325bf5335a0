"""Rotations for texts longer than a model was trained on: what config.json may ask for, and what vLLM is asked.

The kinds are vLLM's. With base b, rotated elements d and factor s, pair i turns by the position times

* ``linear``: b^(-2i/d) / s;
* ``ntk``: (s b)^(-2i/d) / s^(2/d);
* ``yarn``: a mixture of b^(-2i/d) and that over s, by wavelength, and cosines and sines times an attention factor
  (0.1 ln s + 1 unless it is given).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

_ORIGINAL = "original_max_position_embeddings"
# Kind -> the keys that it has besides those of every kind.
_KEYS: dict[str, tuple[str, ...]] = {
    "linear": (),
    "ntk": (),
    "yarn": (_ORIGINAL, "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
}
KINDS = tuple(_KEYS)
_EVERY = ("rope_type", "type", "rope_theta", "partial_rotary_factor", "factor")
# As of all positions: longer ones are not exact in fp32, in which angles are computed.
MOST_POSITIONS = 2**24
# Numbers between which every angle, cosine and sine is finite in fp32; published files are far within them.
_BOUNDS = {
    "attention_factor": (0.001, 1000),
    "beta_fast": (0.001, 1e6),
    "beta_slow": (0.001, 1e6),
    "mscale": (0.001, 1000),
    "mscale_all_dim": (0.001, 1000),
}
# vLLM's, where they are not given.
_BETA_FAST, _BETA_SLOW = 32, 1


@dataclass(frozen=True)
class RopeScaling:
    """A rotation for more positions than the model was trained on.

    Attributes:
        kind: ``linear``, ``ntk`` or ``yarn``.
        factor: how many times as many positions.
        original: those that the model was trained on.
        settings: what else vLLM's layer of the kind takes.
    """

    kind: str
    factor: float
    original: int
    settings: tuple[tuple[str, float | bool], ...] = ()

    @property
    def longest(self) -> int:
        """Positions that are prepared for."""
        return int(self.original * self.factor)

    def for_vllm(self) -> tuple[int, dict[str, Any]]:
        """``max_position`` and ``rope_parameters`` of vLLM's ``get_rope``, but for theta and the rotated part."""
        parameters = {"rope_type": self.kind, "factor": self.factor, **dict(self.settings)}
        if self.kind == "yarn":
            parameters[_ORIGINAL] = self.original
        # vLLM multiplies what it is given by the factor itself, but for this kind.
        return (self.longest if self.kind == "ntk" else self.original), parameters


def kind_of(entry: Mapping[str, Any]) -> Any:
    """What the entry calls its kind; ``type`` is the older key."""
    return entry.get("rope_type") or entry.get("type")


def problems(entry: Mapping[str, Any], trained: int, theta: float) -> Iterator[str]:
    """Why a ``rope_parameters`` of one of KINDS is not computed, naming the key.

    Args:
        trained: positions that the rest of config.json names.
        theta: its base, which is a number of at least 1.
    """
    kind = kind_of(entry)
    own = (*_EVERY, *_KEYS[kind])
    name = "rope_parameters"
    if entry.get("rope_type") and entry.get("type") and entry["rope_type"] != entry["type"]:
        yield f"{name}.type={entry['type']!r} (but rope_type={entry['rope_type']!r}; they are the same setting)"
    for key, value in entry.items():
        if value is None or key in ("rope_type", "type", "rope_theta", "partial_rotary_factor"):
            continue
        if key not in own:
            yield f"{name}.{key}={value!r} (no setting of {kind}; it has {', '.join(own[4:])})"
        elif key == "truncate":
            if not isinstance(value, bool):
                yield f"{name}.{key}={value!r} (must be true or false)"
        elif key == _ORIGINAL:
            if not (isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MOST_POSITIONS):
                yield f"{name}.{key}={value!r} (must be a whole number from 1 to {MOST_POSITIONS})"
        elif key in _BOUNDS:
            low, high = _BOUNDS[key]
            if not (_is_positive(value) and low <= value <= high):
                yield f"{name}.{key}={value!r} (must be a number from {low:g} to {high:g})"
        elif not _is_positive(value):
            yield f"{name}.{key}={value!r} (must be a number above 0)"
    yield from _factor_problems(entry, trained)
    if kind == "yarn":
        yield from _yarn_problems(entry, theta)


def _yarn_problems(entry: Mapping[str, Any], theta: float) -> Iterator[str]:
    """Settings that do not go together: pairs are told apart by their wavelengths."""
    fast, slow = (entry.get(key) or default for key, default in (("beta_fast", _BETA_FAST), ("beta_slow", _BETA_SLOW)))
    if theta <= 1:
        yield f"rope_theta={theta!r} (must be above 1 with yarn, or all pairs turn alike)"
    if _is_positive(fast) and _is_positive(slow) and fast < slow:
        yield f"rope_parameters.beta_fast={fast!r} (must be at least beta_slow, {slow!r})"


def _factor_problems(entry: Mapping[str, Any], trained: int) -> Iterator[str]:
    factor, original = entry.get("factor"), entry.get(_ORIGINAL) or trained
    if factor is None:
        yield "rope_parameters.factor=None (must be a number of at least 1)"
    elif not _is_positive(factor):
        return  # said already
    elif factor < 1:
        yield f"rope_parameters.factor={factor!r} (must be a number of at least 1)"
    elif isinstance(original, int) and original * factor > MOST_POSITIONS:
        yield f"rope_parameters.factor={factor!r} (of {original} positions: more than {MOST_POSITIONS})"


def read(entry: Mapping[str, Any], trained: int) -> RopeScaling:
    """An entry that :func:`problems` has nothing against."""
    kind = kind_of(entry)
    left = ("factor", _ORIGINAL)
    settings = tuple((key, entry[key]) for key in _KEYS[kind] if key not in left and entry.get(key) is not None)
    original = entry.get(_ORIGINAL) if kind == "yarn" else None
    return RopeScaling(kind, float(entry["factor"]), original or trained, settings)


def _is_positive(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= sys.float_info.max
