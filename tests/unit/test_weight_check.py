"""Damaged weights are found and named."""

from __future__ import annotations

import pytest
import torch

from vllm_d2cache.engine.weight_check import check_finite


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_one_bad_number_is_found(value: float, dtype: torch.dtype) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)).to(dtype)
    check_finite(model.named_parameters())
    with torch.no_grad():
        model[1].weight[3, 4] = value
    with pytest.raises(ValueError, match=r"1 of 4 tensors hold NaN or infinity, e\.g\. 1\.weight"):
        check_finite(model.named_parameters())


def test_large_finite_numbers_of_half_precision_are_fine() -> None:
    check_finite([("w", torch.full((1000, 1000), 60000.0, dtype=torch.float16))])


def test_quantised_and_no_parameters_are_fine() -> None:
    check_finite([])
    check_finite([("q", torch.ones(3, dtype=torch.int8)), ("f", torch.ones(3).to(torch.float8_e4m3fn))])
