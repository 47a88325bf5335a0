"""Certainty density against the double loop of docs/methods/d2cache.md, section 3.2."""

from __future__ import annotations

import math

import pytest
import torch

from vllm_d2cache.ops import density
from vllm_d2cache.ops.density import certainty_density

LENGTHS = [1, 2, 7, 33]
SIGMAS = [0.5, 1.0, 3.0, 10.0, 50.0]


def density_by_loop(known: list[bool], sigma: float) -> list[float]:
    """The definition: G known slots on the left, copies of the last flag on the right, one constant normaliser."""
    g = len(known)
    extended = [1.0] * g + [float(k) for k in known] + [float(known[-1])] * g
    phi = [math.exp(-(d**2) / (2 * sigma**2)) for d in range(-3 * g, 3 * g)]
    norm = max(1e-8, math.fsum(phi))

    def term(slot: int, j: int) -> float:
        return math.exp(-((slot - j) ** 2) / (2 * sigma**2)) * extended[j + g]

    return [math.fsum(term(slot, j) for j in range(-g, 2 * g)) / norm for slot in range(g)]


def random_known(length: int, last: bool) -> torch.Tensor:
    known = torch.rand(length) < 0.4
    known[-1] = last
    return known


def alone(known: torch.Tensor, sigma: float) -> torch.Tensor:
    return certainty_density(known.unsqueeze(0), torch.tensor([known.numel()]), torch.tensor([sigma]))[0]


@pytest.mark.parametrize("last", [False, True], ids=["last_masked", "last_known"])
@pytest.mark.parametrize("sigma", SIGMAS)
@pytest.mark.parametrize("length", LENGTHS)
def test_density_matches_the_double_loop(length: int, sigma: float, last: bool) -> None:
    known = random_known(length, last)
    want = torch.tensor(density_by_loop(known.tolist(), sigma), dtype=torch.float64)
    torch.testing.assert_close(alone(known, sigma).double(), want, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("stretches", [1, 2, 100])
def test_no_more_stretches_at_a_time_than_a_tile_has(stretches: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A product copies its lines, each a stretch of slots with its surroundings: for a wide sigma the whole canvas."""
    known, length = torch.rand(3, 333) < 0.4, torch.tensor([333, 70, 200])
    sigma = torch.full((3,), 50.0)
    want, most = certainty_density(known, length, sigma), 64 + 2 * 665
    sizes, product = [], density._product
    monkeypatch.setattr("vllm_d2cache.ops.density._TILE_ELEMENTS", stretches * most)
    monkeypatch.setattr(density, "_product", lambda x, y: (sizes.append(x.numel()), product(x, y))[1])
    torch.testing.assert_close(certainty_density(known, length, sigma), want, rtol=0, atol=0)
    assert max(sizes) <= min(stretches, 3 * 6) * most
    assert sum(sizes) == 3 * 6 * most


def test_weights_of_many_widths_are_no_more_than_those_of_one() -> None:
    """Clients choose the widths: what is kept for a batch must not grow with them, beyond a line for each."""

    def weights(canvas: int, *sigma: float) -> torch.Tensor:
        return density._terms((canvas,) * len(sigma), sigma, canvas, torch.device("cpu")).weights

    sigma, length = torch.linspace(1, 90, 128), torch.full((128,), 333)
    known = torch.rand(128, 333) < 0.4
    together = certainty_density(known, length, sigma)
    for row in (0, 5, 60, 127):
        assert torch.equal(together[row], alone(known[row], float(sigma[row])))
    shapes = {
        one: weights(*one).shape for one in ((4096, 1e9), (100_000, 1e9), (333, *sigma.tolist()), (64, 10.0, 10.0))
    }
    assert all(math.prod(shape) <= density._WEIGHT_ELEMENTS or shape[2] == 1 for shape in shapes.values())
    assert shapes[100_000, 1e9] == (1, 400_001, 1)
    assert shapes[64, 10.0, 10.0] == (1, 64 + 2 * 128, 64)


def test_far_slots_keep_their_order() -> None:
    """Fifteen sigmas from any text an FFT would return noise; the sum still falls off with the distance."""
    known = torch.zeros(64, dtype=torch.bool)
    density = alone(known, 3.0)[:36]
    assert (density[:-1] > density[1:]).all()


def test_never_negative_and_at_most_about_one() -> None:
    for sigma in SIGMAS:
        density = alone(random_known(33, True), sigma)
        assert (density >= 0).all()
        assert (density <= 1 + 1e-5).all()


def test_everything_known_is_nearly_one_in_the_middle() -> None:
    assert alone(torch.ones(33, dtype=torch.bool), 2.0).sub(1).abs().max() < 1e-5


def test_sigma_zero_is_one_inside_the_canvas_and_zero_outside() -> None:
    known = torch.zeros(2, 5, dtype=torch.bool)
    density = certainty_density(known, torch.tensor([5, 3]), torch.tensor([0.0, 0.0]))
    assert density.tolist() == [[1.0] * 5, [1.0] * 3 + [0.0] * 2]


def test_rows_padded_together_are_bitwise_the_rows_alone() -> None:
    cases = [(g, s, last) for g in (*LENGTHS, 64) for s in (*SIGMAS, 0.0, 0.05) for last in (False, True)]
    rows = [random_known(g, last) for g, _, last in cases]
    lengths = torch.tensor([g for g, _, _ in cases])
    sigma = torch.tensor([s for _, s, _ in cases])
    padded = torch.rand(len(rows), 80) < 0.5  # what lies past a row's canvas must not matter
    for r, known in enumerate(rows):
        padded[r, : known.numel()] = known
    together = certainty_density(padded, lengths, sigma)
    for r, known in enumerate(rows):
        want = alone(known, float(sigma[r]))
        assert torch.equal(together[r, : known.numel()], want), cases[r]
        assert (together[r, known.numel() :] == 0).all()


def test_a_wider_mate_adds_no_far_terms() -> None:
    """Farther than the kernel reaches the density is zero, also where a mate's kernel reaches farther."""
    known = torch.zeros(2, 300, dtype=torch.bool)
    together = certainty_density(known, torch.tensor([300, 300]), torch.tensor([10.0, 80.0]))
    assert torch.equal(together[0], alone(known[0], 10.0))
    assert together[0, 200] == 0 < together[1, 200]


def test_tiles_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    known = torch.rand(7, 33) < 0.4
    lengths, sigma = torch.full((7,), 33), torch.linspace(0.5, 20, 7)
    want = certainty_density(known, lengths, sigma)
    monkeypatch.setattr("vllm_d2cache.ops.density._TILE_ELEMENTS", 1)
    assert torch.equal(certainty_density(known, lengths, sigma), want)


@pytest.mark.parametrize("sigma", [1e-30, 1e6, 3e38, float("inf")])
def test_any_width_that_options_allow_gives_finite_numbers(sigma: float) -> None:
    density = alone(random_known(33, False), sigma)
    assert density.isfinite().all()
    assert (density >= 0).all()
