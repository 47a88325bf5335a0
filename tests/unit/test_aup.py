"""Accuracy under parallelism, worked out by hand."""

from __future__ import annotations

import math

import pytest

from benchmarks.quality.aup import aup


def test_one_setting_is_a_rectangle() -> None:
    assert aup([(2.0, 40.0)], best=40.0) == pytest.approx(80.0)


def test_lossless_speed_up_adds_its_area() -> None:
    # 1 x 60 up to the slowest point, then 2 more tokens a forward at full weight.
    assert aup([(1.0, 60.0), (3.0, 60.0)], best=60.0) == pytest.approx(60.0 + 2 * 60.0)


def test_lost_accuracy_weighs_less() -> None:
    weight = math.exp(-3 * (1 - 57 / 60))
    want = 60.0 + 2 * (60.0 + 57.0 * weight) / 2
    assert aup([(3.0, 57.0), (1.0, 60.0)], best=60.0) == pytest.approx(want)


def test_points_that_lost_more_than_five_do_not_count() -> None:
    assert aup([(1.0, 60.0), (8.0, 54.9)], best=60.0) == pytest.approx(60.0)
    assert aup([(1.0, 60.0), (8.0, 55.0)], best=60.0) > 60.0


def test_accuracy_above_the_best_known_is_not_rewarded() -> None:
    assert aup([(1.0, 60.0), (2.0, 66.0)], best=60.0) == pytest.approx(60.0 + 63.0)


@pytest.mark.parametrize(
    ("points", "best"), [([], 50.0), ([(0.0, 50.0)], 50.0), ([(1.0, 101.0)], 50.0), ([(1.0, 50.0)], 0.0)]
)
def test_impossible_curves_are_refused(points: list[tuple[float, float]], best: float) -> None:
    with pytest.raises(ValueError, match="points"):
        aup(points, best)
