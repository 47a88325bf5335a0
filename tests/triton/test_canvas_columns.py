"""Slots to positions and back against their PyTorch twins: the same numbers, to the last one."""

from __future__ import annotations

import pytest
import torch

from vllm_d2cache.ops import canvas_columns as twin
from vllm_d2cache.ops.triton import canvas_columns as kernels

PROMPTS, CANVASES = [1, 9, 700, 3], [4, 1, 30, 12]


def lines(device: torch.device, shift: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor(PROMPTS, device=device) - shift, torch.tensor(CANVASES, device=device)


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.float32])
def test_slots_to_positions(dtype: torch.dtype, shift: int, device: torch.device) -> None:
    values = (torch.randn(4, 31, device=device) * 9).to(dtype)
    arguments = (values, *lines(device, shift), 740)
    assert torch.equal(kernels.to_positions(*arguments), twin.to_positions.__wrapped__(*arguments))


@pytest.mark.parametrize("shift", [0, 1])
def test_positions_to_slots(shift: int, device: torch.device) -> None:
    values = torch.rand(4, 733, device=device) < 0.5
    arguments = (values, *lines(device, shift), 31)
    assert torch.equal(kernels.to_slots(*arguments), twin.to_slots.__wrapped__(*arguments))
    part = (values[:, :731], *lines(device, shift), 31)
    assert torch.equal(kernels.to_slots(*part), twin.to_slots.__wrapped__(*part))
    turned = (values.t().contiguous().t(), *lines(device, shift), 31)
    assert torch.equal(kernels.to_slots(*turned), twin.to_slots.__wrapped__(*arguments))


@pytest.mark.parametrize("shift", [0, 1])
def test_nothing_is_read_behind_a_line(shift: int, device: torch.device) -> None:
    memory = torch.ones(4, 733, dtype=torch.bool, device=device)
    slots = (memory[:, :710], *lines(device, shift), 31)
    got = kernels.to_slots(*slots)
    assert torch.equal(got, twin.to_slots.__wrapped__(*slots))
    assert got.sum(1).tolist() == [4, 1, 10 + shift, 12]
    positions = (memory[:, :8], *lines(device, shift), 740)
    got = kernels.to_positions(*positions)
    assert torch.equal(got, twin.to_positions.__wrapped__(*positions))
    assert got.sum(1).tolist() == [4, 1, 8, 8]
