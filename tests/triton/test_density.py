"""Certainty density against its PyTorch twin."""

from __future__ import annotations

import pytest
import torch

from vllm_d2cache.ops import density as twin
from vllm_d2cache.ops.triton import density as kernels


def test_ragged_rows_of_any_width(device: torch.device) -> None:
    lengths = [1, 2, 7, 33, 64, 65, 33]
    known = torch.rand(7, 80, device=device) < 0.4  # what lies past a row's canvas must not matter
    known[3, 32], known[6, 32] = True, False
    for sigma in (
        [0.5, 1.0, 3.0, 10.0, 0.0, 50.0, 2.0],
        [1e-30, 0.05, float("inf"), 3e38, 1e6, 7.0, 10.0],
    ):
        arguments = (known, torch.tensor(lengths, device=device), torch.tensor(sigma, device=device))
        got, want = kernels.certainty_density(*arguments), twin.certainty_density(*arguments)
        # fp64 sums in another order, rounded to fp32.
        torch.testing.assert_close(got, want, rtol=1e-6, atol=0)


def test_far_slots_keep_their_order(device: torch.device) -> None:
    known = torch.zeros(1, 64, dtype=torch.bool, device=device)
    density = kernels.certainty_density(known, torch.tensor([64], device=device), torch.tensor([3.0], device=device))
    assert (density[0, :35] > density[0, 1:36]).all()


def test_slices_and_no_rows(device: torch.device) -> None:
    known = torch.rand(4, 40, device=device) < 0.5
    length, sigma = torch.full((4,), 20, device=device), torch.full((4,), 3.0, device=device)
    columns = torch.stack([sigma, 9 * sigma], 1)
    got = kernels.certainty_density(known[:, :20], length, columns[:, 0])
    torch.testing.assert_close(got, twin.certainty_density(known[:, :20], length, sigma), rtol=1e-6, atol=0)
    assert kernels.certainty_density(known[:0], length[:0], sigma[:0]).shape == (0, 40)


@pytest.mark.gpu
def test_real_shapes(device: torch.device) -> None:
    known = torch.rand(64, 512, device=device) < 0.3
    length = torch.randint(1, 513, (64,), device=device)
    sigma = torch.full((64,), 10.0, device=device)
    got = kernels.certainty_density(known, length, sigma)
    torch.testing.assert_close(got, twin.certainty_density(known, length, sigma), rtol=1e-6, atol=0)
