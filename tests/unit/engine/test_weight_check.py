"""Damaged weights are found and named."""

from __future__ import annotations

import pytest
import torch

from vllm_d2cache.engine.weight_check import finite_weights

BAD = [float("nan"), float("inf"), float("-inf")]
Named = list[tuple[str, torch.Tensor]]


def check(weights: Named, dtype: torch.dtype = torch.float32) -> None:
    """Every tensor comes through as it is, and nothing is refused."""
    out = list(finite_weights(weights, dtype))
    assert len(out) == len(weights)
    assert all(name == n and tensor is t for (name, tensor), (n, t) in zip(out, weights, strict=True))


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_one_bad_number_is_found(value: float, dtype: torch.dtype) -> None:
    weights: Named = [(f"layer.{i}", torch.randn(8, 9).to(dtype)) for i in range(4)]
    check(weights)
    weights[2][1][3, 4] = value
    with pytest.raises(ValueError, match=r"1 of 4 tensors hold NaN or infinity, e\.g\. layer\.2"):
        check(weights)


@pytest.mark.parametrize(
    ("dtype", "values"), [(torch.float8_e4m3fn, BAD[:1]), (torch.float8_e5m2, BAD)], ids=["e4m3fn", "e5m2"]
)
def test_eight_bits_have_bad_numbers_too(dtype: torch.dtype, values: list[float]) -> None:
    largest = torch.finfo(dtype).max
    check([("w", torch.tensor([largest, -largest, 0.5]).to(dtype))])
    for value in values:
        with pytest.raises(ValueError, match=r"1 of 1 .* e\.g\. w"):
            check([("w", torch.tensor([0.5, value]).to(dtype))])


def test_all_damaged_tensors_are_counted_and_the_first_is_named() -> None:
    weights: Named = [("a", torch.ones(3)), ("b", torch.full((3,), torch.nan)), ("c", torch.full((3,), torch.inf))]
    with pytest.raises(ValueError, match=r"2 of 3 .* e\.g\. b;"):
        check(weights)


def test_large_finite_numbers_are_fine() -> None:
    """Their sum would not be finite."""
    check([("w", torch.full((1000, 1000), 60000.0, dtype=torch.float16))], torch.float16)
    check([("w", torch.full((1000, 1000), 3e38))])


def test_numbers_that_the_models_type_cannot_hold() -> None:
    """They would be loaded as infinity."""
    weights: Named = [("a", torch.ones(3)), ("b", torch.tensor([1.0, -7e4], dtype=torch.bfloat16))]
    check(weights, torch.bfloat16)
    with pytest.raises(ValueError, match=r"--dtype float16 cannot hold numbers of 1 of 2 tensors, e\.g\. b"):
        check(weights, torch.float16)


@pytest.mark.parametrize(
    ("value", "dtype", "advice"),
    [
        (7e4, torch.float16, "take bfloat16 or float32"),
        (3.4e38, torch.float16, "take float32"),
        (3.4e38, torch.bfloat16, "take float32"),
        (1e300, torch.float32, "no other can: convert the checkpoint again"),
        (1e300, torch.bfloat16, "no other can: convert the checkpoint again"),
    ],
)
def test_only_a_type_that_would_do_is_offered(value: float, dtype: torch.dtype, advice: str) -> None:
    weights: Named = [("b", torch.tensor([value, 1.0], dtype=torch.float64)), ("c", torch.tensor([7e4]))]
    with pytest.raises(ValueError) as error:
        check(weights, dtype)
    assert str(error.value).endswith(f"e.g. b; {advice}")


def test_integers_and_nothing_are_fine() -> None:
    check([])
    check([("q", torch.ones(3, dtype=torch.int8)), ("packed", torch.ones(3, dtype=torch.int32)), ("e", torch.ones(0))])
