"""Packing of marked columns against its PyTorch twin: the same numbers, to the last one."""

from __future__ import annotations

import pytest
import torch

from vllm_d2cache.ops import packing as twin
from vllm_d2cache.ops.triton import packing as kernels

SHAPES = [(1, 1), (3, 7), (5, 130), (2, 1024), (2, 1025), (1, 3000)]


def compare(marked: torch.Tensor, room: list[int]) -> None:
    device = marked.device
    starts = torch.tensor([sum(room[:i]) for i in range(len(room))], device=device)
    arguments = (marked, starts, torch.tensor(room, device=device), sum(room))
    for got, want in zip(kernels.pack_columns(*arguments), twin.pack_columns.__wrapped__(*arguments), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("share", [0.0, 0.1, 0.9, 1.0])
def test_places_to_spare_and_none_to_spare(shape: tuple[int, int], share: float, device: torch.device) -> None:
    marked = torch.rand(shape, device=device) < share
    counts = marked.sum(1).tolist()
    compare(marked, counts)
    compare(marked, [n + 3 for n in counts])
    compare(marked, [n + 1030 for n in counts])


def test_lines_with_more_columns_than_places_do_not_write_into_the_next(device: torch.device) -> None:
    marked = torch.ones(3, 9, dtype=torch.bool, device=device)
    compare(marked, [4, 0, 2])


def test_a_part_of_wider_lines(device: torch.device) -> None:
    marked = torch.rand(4, 50, device=device) < 0.5
    part = marked[:, :33]
    compare(part, [n + 2 for n in part.sum(1).tolist()])
