"""Up to how many rows padding is free, by card."""

from __future__ import annotations

import re

import pytest

from vllm_d2cache.graphs.ridge import CARDS, LEAST, OTHERS, ridge


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("NVIDIA H100 80GB HBM3", 295),
        ("NVIDIA H100 PCIe", 378),
        ("NVIDIA H200", 206),
        ("NVIDIA GH200 480GB", 247),
        ("NVIDIA A100-SXM4-40GB", 201),
        ("NVIDIA A100-SXM4-80GB", 153),
        ("NVIDIA A10", 208),
        ("NVIDIA A10G", 117),
        ("NVIDIA L4", 403),
        ("NVIDIA L40S", 419),
        ("NVIDIA GeForce RTX 4090", 164),
        ("NVIDIA GB200", 281),
    ],
)
def test_a_known_card_by_its_name(name: str, rows: int) -> None:
    assert ridge(name, (0, 0), 2) == rows


def test_a_longer_name_stands_before_the_shorter_one_that_it_holds() -> None:
    names = [name for name, _, _ in CARDS]
    for index, name in enumerate(names):
        assert not any(re.search(rf"\b{earlier}\b", name) for earlier in names[:index]), name


def test_another_card_has_the_lowest_ridge_of_its_kind() -> None:
    assert ridge("NVIDIA H999", (9, 0), 2) == OTHERS[9]
    assert ridge("something else", (7, 5), 2) == LEAST


def test_lighter_weights_are_read_sooner() -> None:
    assert ridge("NVIDIA H100 80GB HBM3", (9, 0), 1) == 147
    assert ridge("NVIDIA H100 80GB HBM3", (9, 0), 4) == 295, "products of float32 weights are no faster"
