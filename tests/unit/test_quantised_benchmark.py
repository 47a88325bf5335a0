"""The table of quantised weights, from answers that are known."""

from __future__ import annotations

from benchmarks.quantised import markdown


def test_a_form_is_compared_with_bf16_problem_by_problem() -> None:
    base = [True] * 60 + [False] * 40
    worse = [False] * 5 + base[5:99] + [True]
    lines = markdown({"models/a": {"bf16": base, "INT8": base, "INT4": worse}}).splitlines()
    assert lines[2] == "| a | bf16 | 60.0 |  |  |  |  |"
    assert lines[3].startswith("| a | INT8 | 60.0 | +0.0 [") and lines[3].endswith("| 0, 0 | 1 | 1: kept |")
    assert lines[4].startswith("| a | INT4 | 56.0 | -4.0 [") and lines[4].endswith("| 1, 5 | 0.22 | 3: not kept |")
