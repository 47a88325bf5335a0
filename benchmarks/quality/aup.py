"""Accuracy under parallelism: one figure for a whole curve of accuracy against tokens per forward (d3LLM).

Each point of the curve is one decoding setting of a method: rho, the tokens per forward, and y, the accuracy in
percent. The figure is the area under y over rho, from rho = 0, in which every accuracy is weighted by how close it
comes to the best accuracy known for the task: W(y) = min(exp(-alpha (1 - y / y_best)), 1).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import pairwise

ALPHA = 3.0
TOLERATED_LOSS = 5.0
"""Points whose accuracy is this far below that of the slowest point do not count, in percent."""


def aup(points: Iterable[tuple[float, float]], best: float, alpha: float = ALPHA) -> float:
    """Accuracy under parallelism of one method.

    Args:
        points: (tokens per forward > 0, accuracy in 0..100) of each setting, in any order.
        best: the best accuracy any compared method has on the task.

    Raises:
        ValueError: no point, or one out of range.
    """
    curve = sorted(points)
    if not curve:
        raise ValueError("points: at least one is needed")
    if best <= 0 or any(rho <= 0 or not 0 <= y <= 100 for rho, y in curve):
        raise ValueError("points: tokens per forward must be above 0, accuracies within 0..100, and best above 0")
    floor = curve[0][1] - TOLERATED_LOSS
    curve = [(rho, y) for rho, y in curve if y >= floor]
    weighted = [(rho, y * min(math.exp(-alpha * (1 - y / best)), 1.0)) for rho, y in curve]
    # Left of the slowest point the plain accuracy counts: every method could decode that slowly.
    area = curve[0][0] * curve[0][1]
    for (left, low), (right, high) in pairwise(weighted):
        area += (right - left) * (low + high) / 2
    return area
