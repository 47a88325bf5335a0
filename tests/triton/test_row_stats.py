"""Row statistics against their PyTorch twin."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from vllm_d2cache.ops import row_stats as twin
from vllm_d2cache.ops.row_stats import RowParams, RowStats
from vllm_d2cache.ops.triton import row_stats as kernels

MASK = 11
VOCAB = 155  # several tiles and a part of one
REAL = [
    pytest.param(126_464, marks=pytest.mark.gpu, id="llada-8b"),
    pytest.param(152_064, marks=pytest.mark.gpu, id="dream-7b"),
]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "BLOCK", 64)


def make_params(n: int, device: torch.device, temperature: float = 0, top_p: float = 1, top_k: int = 0) -> RowParams:
    return RowParams(
        torch.full((n,), float(temperature), device=device),
        torch.full((n,), float(top_p), device=device),
        torch.full((n,), top_k, device=device),
        torch.rand(n, dtype=torch.float64, device=device),
        temperature > 0,
        top_p < 1 or top_k > 0,
    )


def check(
    logits: torch.Tensor, params: RowParams, mask: int = MASK, margin: bool = True, entropy: bool = True
) -> RowStats:
    """Tokens are the twin's, numbers to the rounding of sums over the vocabulary."""
    before = logits.clone()
    got = kernels.tile_stats(logits, params, mask, margin, entropy)
    assert torch.equal(logits, before)
    want = twin.tile_stats(before, params, mask, margin, entropy)
    assert got.token.dtype == want.token.dtype
    assert torch.equal(got.token, want.token)
    for name in ("confidence", "margin", "entropy"):
        mine, other = getattr(got, name), getattr(want, name)
        assert (mine is None) == (other is None)
        if mine is not None:
            torch.testing.assert_close(mine, other, rtol=2e-5, atol=2e-6, msg=name)
    return got


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocab", [17, 64, VOCAB])
def test_greedy(vocab: int, dtype: torch.dtype, device: torch.device) -> None:
    logits = (3 * torch.randn(5, vocab, device=device)).to(dtype)
    check(logits, make_params(5, device))


@pytest.mark.parametrize("top_k", [0, 1, 20])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.3])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_sampling_and_filters(temperature: float, top_p: float, top_k: int, device: torch.device) -> None:
    logits = 3 * torch.randn(2, VOCAB, device=device)
    logits[:, MASK] -= 20
    check(logits, make_params(2, device, temperature, top_p, top_k))


def test_rows_with_different_parameters_do_not_mix(device: torch.device) -> None:
    logits = 2 * torch.randn(6, VOCAB, device=device)
    params = RowParams(
        torch.tensor([0.0, 0.7, 1.3, 0.0, 0.7, 1.3], device=device),
        torch.tensor([1.0, 1.0, 0.5, 0.5, 0.9, 1.0], device=device),
        torch.tensor([0, 3, 0, 3, 0, 0], device=device),
        torch.rand(6, dtype=torch.float64, device=device),
        True,
        True,
    )
    together = check(logits, params)
    for r in range(6):
        one = kernels.tile_stats(logits[r : r + 1], params.tile(r, r + 1), MASK, True, True)
        assert torch.equal(one.token, together.token[r : r + 1])
        assert torch.equal(one.confidence, together.confidence[r : r + 1])


@pytest.mark.parametrize("settings", [{}, {"top_k": 1}, {"top_p": 0.1}], ids=str)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("mask", [0, MASK, VOCAB - 1])
def test_mask_token_is_never_chosen(mask: int, temperature: float, settings: dict, device: torch.device) -> None:
    logits = torch.randn(2, VOCAB, device=device)
    logits[:, mask] = logits.amax(1) + torch.tensor([1.0, 1000.0], device=device)
    params = make_params(2, device, temperature, **settings)
    params = replace(params, draw=torch.tensor([1 - 2.0**-53, 0.0], dtype=torch.float64, device=device))
    assert (check(logits, params, mask).token != mask).all()


def test_ties_go_to_the_lower_token(device: torch.device) -> None:
    """Also across tiles, and between the zeros of both signs."""
    logits = torch.full((2, VOCAB), -1.0, device=device)
    logits[0, [80, 20, 150]] = 2.0
    logits[1, [80, 20]] = torch.tensor([0.0, -0.0], device=device)
    assert check(logits, make_params(2, device)).token.tolist() == [20, 20]
    check(logits, make_params(2, device, 1.0, top_k=2))


def test_a_mass_that_equals_top_p_does_not_exceed_it(device: torch.device) -> None:
    logits = torch.full((1, VOCAB), -torch.inf, device=device)
    logits[0, [3, 60, 70, 140]] = 0.0  # a quarter each
    got = check(logits, make_params(1, device, top_p=0.5))
    assert float(got.confidence) == pytest.approx(1 / 3, rel=1e-5)


def test_extreme_draws_hit_tokens_with_probability(device: torch.device) -> None:
    logits = torch.full((2, VOCAB), -torch.inf, device=device)
    logits[:, [3, 140]] = 0.0
    draw = torch.tensor([0.0, 1 - 2.0**-53], dtype=torch.float64, device=device)
    got = check(logits, replace(make_params(2, device, 1.0), draw=draw))
    assert got.token.tolist() == [3, 140]


def test_no_row_and_statistics_nobody_wants(device: torch.device) -> None:
    for n in (0, 2):
        got = check(torch.randn(n, VOCAB, device=device), make_params(n, device), margin=False, entropy=False)
        assert got.margin is None
        assert got.entropy is None
        assert got.token.shape == (n,)


def test_logits_that_are_scaled_already(device: torch.device) -> None:
    """What was filtered out lies at the lowest number of fp32."""
    params = make_params(3, device, 0.7, 0.5, 4)
    logits = twin.scaled_logits(3 * torch.randn(3, VOCAB, device=device), params, MASK)
    got = kernels.tile_stats(logits, params, MASK, True, True, scaled=True)
    want = twin.tile_stats(logits.clone(), params, MASK, True, True, scaled=True)
    assert torch.equal(got.token, want.token)
    for name in ("confidence", "margin", "entropy"):
        torch.testing.assert_close(getattr(got, name), getattr(want, name), rtol=2e-5, atol=2e-6)


def test_rows_of_a_wider_tensor(device: torch.device) -> None:
    """Logits are padded to a multiple of 64 columns; what lies behind the vocabulary is not read."""
    wide = torch.full((3, VOCAB + 21), torch.nan, device=device)
    wide[:, :VOCAB] = torch.randn(3, VOCAB, device=device)
    got = kernels.tile_stats(wide[:, :VOCAB], make_params(3, device), MASK, True, True)
    want = twin.tile_stats(wide[:, :VOCAB].clone(), make_params(3, device), MASK, True, True)
    assert torch.equal(got.token, want.token)
    torch.testing.assert_close(got.entropy, want.entropy, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize(
    "settings", [{}, {"temperature": 0.8}, {"top_p": 0.9}, {"temperature": 1.0, "top_k": 50}], ids=str
)
@pytest.mark.parametrize("vocab", REAL)
def test_real_shapes(vocab: int, settings: dict, monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    monkeypatch.setattr(kernels, "BLOCK", 4096)
    logits = (4 * torch.randn(64, vocab, device=device)).bfloat16()
    params = make_params(64, device, **settings)
    got = kernels.tile_stats(logits, params, MASK, True, True)
    want = twin.tile_stats(logits.clone(), params, MASK, True, True)
    # fp32 sums over 150 thousand tokens; a draw may fall between the two roundings of a boundary.
    assert (got.token == want.token).float().mean() > 0.95
    same = got.token == want.token
    torch.testing.assert_close(got.confidence[same], want.confidence[same], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(got.entropy, want.entropy, rtol=1e-4, atol=1e-4)
