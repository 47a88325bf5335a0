"""Paired differences: known cases, and the interval against what repeated draws give."""

from __future__ import annotations

import math

import numpy as np
import pytest

from vllm_d2cache.cli.paired import Difference, difference


def test_only_problems_that_differ_count() -> None:
    here, there = [True, True, False, True], [True, False, True, False]
    found = difference(here, there)
    assert found == Difference(pairs=4, gained=2, lost=1)
    assert found.points == 25.0


@pytest.mark.parametrize(("here", "there"), [([], []), ([True], [True, False])], ids=["none", "unequal"])
def test_other_problems_are_refused(here: list[bool], there: list[bool]) -> None:
    with pytest.raises(ValueError, match="same problems"):
        difference(here, there)


def test_p_value_of_known_splits() -> None:
    assert Difference(100, 0, 0).p_value == 1.0
    assert Difference(100, 5, 5).p_value == 1.0
    assert Difference(100, 0, 5).p_value == pytest.approx(2 / 32)
    # Two tails of a fair coin's ten throws: 2 * (1 + 10 + 45) / 1024.
    assert Difference(100, 8, 2).p_value == pytest.approx(112 / 1024)
    assert Difference(100, 2, 8).p_value == Difference(100, 8, 2).p_value


def test_p_value_of_large_tests_is_a_number() -> None:
    assert 0 < Difference(20_000, 3_000, 3_300).p_value < 0.001
    assert Difference(20_000, 5_000, 5_000).p_value == 1.0


def test_interval_by_hand() -> None:
    low, high = Difference(98, 9, 3).interval
    # (9 + 1) / 100 and (3 + 1) / 100 after a problem on either side.
    width = 1.959964 * math.sqrt((0.10 + 0.04 - 0.06**2) / 100)
    assert (low, high) == (pytest.approx(100 * (0.06 - width)), pytest.approx(100 * (0.06 + width)))


def test_equal_settings_have_an_interval_around_nothing() -> None:
    low, high = Difference(500, 0, 0).interval
    assert low == -high < 0
    assert high < 1.0


def test_interval_stays_within_what_is_possible() -> None:
    assert Difference(1, 1, 0).interval[1] == 100.0
    assert Difference(1, 0, 1).interval[0] == -100.0


def test_interval_is_that_of_the_bootstrap() -> None:
    """Of 2,000 pairs drawn again and again from 2,000 pairs, the middle 95 % of the differences."""
    here, there = np.zeros(2000, dtype=bool), np.zeros(2000, dtype=bool)
    here[:1500], there[30:1450] = True, True
    rng = np.random.default_rng(0)
    drawn = rng.integers(0, 2000, size=(4000, 2000))
    again = 100 * (here[drawn].mean(1) - there[drawn].mean(1))
    expected = np.quantile(again, [0.025, 0.975])
    assert difference(list(here), list(there)).interval == pytest.approx(expected, abs=0.1)


@pytest.mark.parametrize("pairs", [50, 500])
def test_interval_holds_the_truth_as_often_as_it_says(pairs: int) -> None:
    rng = np.random.default_rng(1)
    held = 0
    for gained, lost, _ in rng.multinomial(pairs, (0.08, 0.05, 0.87), size=3000):
        low, high = Difference(pairs, int(gained), int(lost)).interval
        held += low <= 3.0 <= high
    assert 0.93 <= held / 3000 <= 0.985


def test_text_has_signs() -> None:
    assert str(Difference(98, 3, 9)) == "-6.1 [-13.2, +1.2]"
