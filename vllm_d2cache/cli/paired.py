"""The same problems under two settings: how many more are right, and how sure that is.

Two scores of the same problems vary together, as most problems are right or wrong under both. What tells the settings
apart is only the problems that one of them gets right and the other wrong; an interval made from these is several times
narrower than the intervals of the two scores.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

Z = 1.959964
"""Half width of the middle 95 % of a normal distribution, in standard deviations."""


@dataclass(frozen=True)
class Difference:
    """Right answers under one setting against those under another, on the same problems."""

    pairs: int
    gained: int  # right here, wrong there
    lost: int  # wrong here, right there

    @property
    def points(self) -> float:
        """The difference of the scores, percent points."""
        return 100 * (self.gained - self.lost) / self.pairs

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the difference, percent points (Bonett and Price's adjusted Wald interval, 2012).

        One problem is added to either side first: without that, settings which never differ would have no width at all.
        """
        total = self.pairs + 2
        gained, lost = (self.gained + 1) / total, (self.lost + 1) / total
        width = Z * math.sqrt((gained + lost - (gained - lost) ** 2) / total)
        low, high = gained - lost - width, gained - lost + width
        return 100 * max(low, -1.0), 100 * min(high, 1.0)

    @property
    def p_value(self) -> float:
        """How often so uneven a split, or a more uneven one, comes by chance (McNemar's exact test, two-sided)."""
        decided, fewer = self.gained + self.lost, min(self.gained, self.lost)
        tail = sum(math.comb(decided, k) for k in range(fewer + 1))
        # Exact integers: 2.0 ** -decided is zero for the large tests this is meant for.
        return min(1.0, 2 * tail / 2**decided)

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.points:+.1f} [{low:+.1f}, {high:+.1f}]"


def difference(here: Sequence[bool], there: Sequence[bool]) -> Difference:
    """Compare two lists of right and wrong, of the same problems in the same order.

    Raises:
        ValueError: they are not as long as each other, or empty.
    """
    if len(here) != len(there) or not here:
        raise ValueError(f"the same problems are needed on both sides, got {len(here)} and {len(there)}")
    gained = sum(bool(a) and not b for a, b in zip(here, there, strict=True))
    lost = sum(bool(b) and not a for a, b in zip(here, there, strict=True))
    return Difference(len(here), gained, lost)
