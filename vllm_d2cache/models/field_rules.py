"""What a field of config.json may hold, said once for each field, so that a wrong one is refused by its name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Rule:
    """What a field may hold.

    Attributes:
        kind: int, float (a whole number will do), bool or dict.
        least: smallest valid number.
        most: largest valid number; None = no limit.
        null: null will do: it stands for an absent field.
        above: ``least`` itself is not valid.
    """

    kind: type
    least: float = 0
    most: float | None = None
    null: bool = False
    above: bool = False

    def accepts(self, value: Any) -> bool:
        """Whether a field may hold ``value``."""
        if value is None:
            return self.null
        if self.kind in (bool, dict):
            return isinstance(value, self.kind)
        if isinstance(value, bool) or not isinstance(value, int if self.kind is int else (int, float)):
            return False
        large_enough = value > self.least if self.above else value >= self.least
        return large_enough and (self.most is None or value <= self.most)

    def __str__(self) -> str:
        """The valid values, in words."""
        if self.kind in (bool, dict):
            text = "true or false" if self.kind is bool else "an object"
        else:
            text = f"{'an integer' if self.kind is int else 'a number'} {'above' if self.above else 'of at least'} "
            text += f"{self.least:g}" + ("" if self.most is None else f" and at most {self.most:g}")
        return text + (" or null" if self.null else "")


SIZE = Rule(int, 1)
COUNT = Rule(int)
MAYBE_SIZE = Rule(int, 1, null=True)
MAYBE_TOKEN = Rule(int, null=True)
POSITIVE = Rule(float, above=True)
SHARE = Rule(float, most=1, above=True)
SWITCH = Rule(bool)
MAYBE_OBJECT = Rule(dict, null=True)


def wrong_fields(fields: Mapping[str, Any], rules: Mapping[str, Rule], required: tuple[str, ...] = ()) -> list[str]:
    """One sentence for each field that is not as its rule wants it, and for each required one that is not there."""
    problems = [f"{name} is missing (must be {rules[name]})" for name in required if name not in fields]
    for name, rule in rules.items():
        if name in fields and not rule.accepts(fields[name]):
            problems.append(f"{name}={fields[name]!r} (must be {rule})")
    return problems
