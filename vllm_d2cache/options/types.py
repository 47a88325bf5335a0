"""Types of options: what values an option takes, said in words and checked. Imports neither vLLM nor torch."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import Any


class OptionError(ValueError):
    """An option is unknown or out of range. The message names the field and the valid values."""


@dataclass(frozen=True)
class Number:
    """An int or float option within [low, high] (or (low, high] when ``open_low``).

    Attributes:
        default: of an option that a policy or decoder adds; all others have theirs in options.request.RequestOptions.
    """

    kind: type
    low: float
    high: float = math.inf
    open_low: bool = False
    note: str = ""
    default: float | None = None

    def describe(self) -> str:
        """The valid values in words."""
        noun = "an integer" if self.kind is int else "a number"
        low = f"> {self.low:g}" if self.open_low else f">= {self.low:g}"
        high = "" if self.high == math.inf else f" and <= {self.high:g}"
        return f"{noun} {low}{high}" + (f" ({self.note})" if self.note else "")

    def parse(self, value: Any) -> Any:
        """``value`` as ``kind``, or None if it is not valid."""
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
class Choice:
    """A string option out of a fixed list.

    Attributes:
        default: as in Number.
    """

    values: tuple[str, ...]
    default: str | None = None

    def describe(self) -> str:
        """The valid values in words."""
        return "one of " + ", ".join(repr(v) for v in self.values)

    def parse(self, value: Any) -> Any:
        """``value``, or None if it is not valid."""
        return value if isinstance(value, str) and value in self.values else None


@dataclass(frozen=True)
class Text:
    """A string option of any value but the empty one."""

    noun: str

    def describe(self) -> str:
        """The valid values in words."""
        return self.noun

    def parse(self, value: Any) -> Any:
        """``value``, or None if it is not valid."""
        return value if isinstance(value, str) and value else None
