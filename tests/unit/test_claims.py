"""What `python -m benchmarks.claims` counts: the order of commits, and differences from a claim's first setting."""

from __future__ import annotations

import pytest

from benchmarks.claims import CLAIMS, Result, from_first, markdown, order_of
from tools.traces import Trace
from vllm_d2cache.options.request import PREFIX
from vllm_d2cache.requests.resolve import parse_request_options, parse_server_options, resolve


def trace(committed: list[list[int]], length: int) -> Trace:
    """A trace of these slots by step."""
    pairs = [[(slot, 7) for slot in step] for step in committed]
    return Trace("r", 3, 8, {}, [None] * len(pairs), pairs, [7] * length, "stop")


@pytest.mark.parametrize(
    ("committed", "length", "order"),
    [
        ([[0], [1], [2], [3]], 4, 1.0),
        ([[3], [2], [1], [0]], 4, -1.0),
        ([[7], [6], [0], [1], [2], [3]], 4, 1.0),  # what is behind the end of the text does not count
        ([[0, 1], [2, 3]], 4, 0.894),  # slots of one step share a rank
        ([[0, 1, 2, 3]], 4, None),
        ([[0], [1], [2]], 3, None),
    ],
)
def test_order_is_the_rank_correlation_of_place_and_step(
    committed: list[list[int]], length: int, order: float | None
) -> None:
    found = order_of(trace(committed, length))
    assert found == (order if order is None else pytest.approx(order, abs=1e-3))


def test_differences_are_from_the_first_setting_of_the_claim() -> None:
    first, second, third = (
        Result(claim.name, dict(options), 50.0, 0.5, 0.0, 100.0, 1.0, marks)
        for claim, options, marks in (
            (CLAIMS[0], CLAIMS[0].settings[0], "1100"),
            (CLAIMS[0], CLAIMS[0].settings[1], "1110"),
            (CLAIMS[1], CLAIMS[1].settings[1], "0000"),
        )
    )
    assert from_first(first, [first, second, third]) is None
    found = from_first(second, [first, second, third])
    assert found is not None
    assert (found.gained, found.lost) == (1, 0)
    lines = markdown([first, second, third]).splitlines()
    assert sum(line.startswith("### ") for line in lines) == len(CLAIMS)
    assert any(line.startswith("| full sigma 10 | 50.0 | +25.0 [") for line in lines)


@pytest.mark.parametrize("options", [options for claim in CLAIMS for options in claim.settings], ids=str)
def test_every_setting_is_one_that_requests_can_have(options: dict[str, object]) -> None:
    resolve(parse_server_options({}), parse_request_options({PREFIX + name: value for name, value in options.items()}))
