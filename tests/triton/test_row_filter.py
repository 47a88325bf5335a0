"""Nucleus and top-k filters against their PyTorch twin."""

from __future__ import annotations

import pytest
import torch

from vllm_d2cache.ops import row_filter as twin
from vllm_d2cache.ops.triton import row_filter as kernels

MASK = 11
VOCAB = 155  # several tiles and a part of one
LOWEST = torch.finfo(torch.float32).min
SETTINGS = [(0.9, 0), (0.3, 0), (1.0, 1), (1.0, 20), (0.9, 20), (0.999, 200)]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "BLOCK", 64)


def check(logits: torch.Tensor, top_p: float | list[float], top_k: int | list[int]) -> torch.Tensor:
    """The twin keeps the same tokens; [m, vocab] as the kernel leaves it."""
    limits = (
        (torch.ones(len(logits), device=logits.device) * torch.tensor(top_p, device=logits.device)).float(),
        (torch.ones(len(logits), dtype=torch.int64, device=logits.device) * torch.tensor(top_k, device=logits.device)),
    )
    got, want = logits.clone(), logits.clone()
    kernels.filter_logits(got, *limits, MASK)
    twin.filter_logits.__wrapped__(want, *limits, MASK)
    assert torch.equal(got, want)
    return got


@pytest.mark.parametrize(("top_p", "top_k"), SETTINGS)
def test_what_is_kept(top_p: float, top_k: int, device: torch.device) -> None:
    got = check(3 * torch.randn(5, VOCAB, device=device), top_p, top_k)
    if 0 < top_k < VOCAB:
        assert ((got > LOWEST).sum(1) <= top_k + 1).all()  # one more where the mask leads


def test_rows_without_a_filter_stay_as_they_are(device: torch.device) -> None:
    logits = torch.randn(4, VOCAB, device=device)
    got = check(logits, [1.0, 0.2, 1.0, 1.0], [0, 0, 2, 0])
    assert torch.equal(got[[0, 3]], logits[[0, 3]])
    assert ((got > LOWEST).sum(1)[1:3] < VOCAB).all()


def test_the_second_is_kept_where_the_mask_leads(device: torch.device) -> None:
    logits = torch.randn(3, VOCAB, device=device)
    logits[:, MASK] = 30.0
    logits[2, 3] = 30.0  # as much, and to the left: this one leads
    got = check(logits, 0.1, 1)
    assert (got > LOWEST).sum(1).tolist() == [2, 2, 1]


def test_ties_go_to_the_lower_token(device: torch.device) -> None:
    logits = torch.full((2, VOCAB), -1.0, device=device)
    logits[0, [80, 20, 150]] = 2.0
    logits[1, [80, 20]] = torch.tensor([0.0, -0.0], device=device)
    assert (check(logits, 1.0, 2)[0] > LOWEST).nonzero().flatten().tolist() == [20, 80]


def test_edits_leave_tokens_without_any_probability(device: torch.device) -> None:
    logits = torch.full((2, VOCAB), -torch.inf, device=device)
    logits[:, [3, 60, 70, 140]] = 0.0
    got = check(logits, [0.5, 1.0], [0, 3])
    assert [(row > LOWEST).nonzero().flatten().tolist() for row in got] == [[3, 60, 70], [3, 60, 70]]


def test_rows_of_a_wider_tensor(device: torch.device) -> None:
    wide = torch.full((3, VOCAB + 21), 100.0, device=device)
    wide[:, :VOCAB] = torch.randn(3, VOCAB, device=device)
    want = wide[:, :VOCAB].clone()
    top_p, top_k = torch.full((3,), 0.8, device=device), torch.zeros(3, dtype=torch.int64, device=device)
    kernels.filter_logits(wide[:, :VOCAB], top_p, top_k, MASK)
    twin.filter_logits.__wrapped__(want, top_p, top_k, MASK)
    assert torch.equal(wide[:, :VOCAB], want)
    assert (wide[:, VOCAB:] == 100).all()


def test_no_row(device: torch.device) -> None:
    check(torch.empty(0, VOCAB, device=device), 0.5, 0)
