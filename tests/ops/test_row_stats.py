"""Row statistics against a plain float64 reference (docs/methods/d2cache.md, section 2, step 4)."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch

from vllm_d2cache.ops import row_stats as module
from vllm_d2cache.ops.row_stats import RowParams, RowStats, row_stats

VOCAB, MASK = 29, 11


def make_params(n: int, temperature: float = 0.0, top_p: float = 1.0, top_k: int = 0) -> RowParams:
    draw = torch.rand(n, dtype=torch.float64)
    return RowParams(
        torch.full((n,), temperature),
        torch.full((n,), top_p),
        torch.full((n,), top_k),
        draw,
        temperature > 0,
        top_p < 1 or top_k > 0,
    )


def stats_of(logits: torch.Tensor, params: RowParams, margin: bool = True, entropy: bool = True) -> RowStats:
    return row_stats(logits, torch.clone, params, MASK, margin, entropy)


def reference_probs(row: torch.Tensor, temperature: float, top_p: float, top_k: int) -> list[float]:
    """Probabilities after temperature, nucleus and top-k, one candidate after the other, in float64."""
    logits = [float(x) / (temperature or 1.0) for x in row.double()]
    top = max(logits)
    weights = [math.exp(x - top) for x in logits]
    probs = [w / math.fsum(weights) for w in weights]
    order = sorted(range(len(probs)), key=lambda i: (-probs[i], i))
    kept, mass = [], 0.0
    for i in order:
        kept.append(i)
        mass += probs[i]
        if mass > top_p:
            break
    kept = kept[: top_k or None]
    total = math.fsum(probs[i] for i in kept)
    return [probs[i] / total if i in kept else 0.0 for i in range(len(probs))]


def check_row(row: torch.Tensor, params: RowParams, got: RowStats, r: int) -> None:
    probs = reference_probs(row, float(params.temperature[r]), float(params.top_p[r]), int(params.top_k[r]))
    token = int(got.token[r])
    allowed = [0.0 if i == MASK else p for i, p in enumerate(probs)]
    if params.temperature[r] > 0:
        target = float(params.draw[r]) * math.fsum(allowed)
        want = next(i for i, running in enumerate(itertools.accumulate(allowed)) if running > target)
    else:
        want = max(range(VOCAB), key=lambda i: (allowed[i], -i))
    assert token == want
    assert float(got.confidence[r]) == pytest.approx(probs[token], rel=1e-5)
    first, second = sorted(probs, reverse=True)[:2]
    assert got.margin is not None
    assert got.entropy is not None
    assert float(got.margin[r]) == pytest.approx(first - second, abs=1e-6)
    entropy = -math.fsum(p * math.log(p + 1e-10) for p in probs)
    assert float(got.entropy[r]) == pytest.approx(entropy, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("top_k", [0, 2, 7])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.3])
@pytest.mark.parametrize("temperature", [0.0, 0.5, 1.7])
def test_matches_the_reference(temperature: float, top_p: float, top_k: int) -> None:
    logits = torch.randn(12, VOCAB) * 3
    logits[:, MASK] -= 20  # the mask on top has its own tests
    params = make_params(12, temperature, top_p, top_k)
    got = stats_of(logits, params)
    for r in range(12):
        check_row(logits[r], params, got, r)


def test_nucleus_keeps_the_crossing_token_and_nothing_after_it() -> None:
    probs = torch.full((1, VOCAB), 1e-9)
    probs[0, [4, 2, 7, 9]] = torch.tensor([0.5, 0.25, 0.15, 0.1])
    for top_p, confidence in ((0.4, 1.0), (0.6, 0.5 / 0.75), (0.8, 0.5 / 0.9), (0.95, 0.5)):
        got = stats_of(probs.log(), make_params(1, top_p=top_p))
        assert float(got.confidence[0]) == pytest.approx(confidence, rel=1e-4), top_p


def test_a_mass_that_equals_top_p_does_not_exceed_it() -> None:
    logits = torch.full((1, VOCAB), -torch.inf)
    logits[0, [3, 5, 8, 9]] = 0.0  # a quarter each
    assert float(stats_of(logits, make_params(1, top_p=0.5)).confidence[0]) == pytest.approx(1 / 3, rel=1e-5)


def test_rows_with_different_parameters_do_not_mix() -> None:
    n = 9
    logits = torch.randn(n, VOCAB) * 2
    logits[:, MASK] = -9
    params = RowParams(
        torch.tensor([0.0, 0.7, 1.3] * 3),
        torch.tensor([1.0, 1.0, 1.0, 0.5, 0.5, 0.5, 0.9, 0.9, 0.9]),
        torch.tensor([0, 3, 0, 0, 3, 0, 4, 4, 0]),
        torch.rand(n, dtype=torch.float64),
        True,
        True,
    )
    got = stats_of(logits, params)
    for r in range(n):
        check_row(logits[r], params, got, r)
        one = params.tile(r, r + 1)
        plain = replace(one, samples=bool(one.temperature > 0), filters=bool((one.top_p < 1) | (one.top_k > 0)))
        single = stats_of(logits[r : r + 1], plain)
        assert torch.equal(single.token, got.token[r : r + 1])
        assert torch.equal(single.confidence, got.confidence[r : r + 1])


@pytest.mark.parametrize("gap", [1.0, 30.0, 1000.0])
@pytest.mark.parametrize("settings", [{}, {"top_k": 1}, {"top_p": 0.1}, {"top_p": 0.5, "top_k": 3}])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_mask_token_is_never_chosen_but_keeps_its_share(temperature: float, settings: dict, gap: float) -> None:
    logits = torch.randn(40, VOCAB)
    logits[:, MASK] = logits.amax(1) + gap
    params = make_params(40, temperature, **settings)
    params.draw[:2] = torch.tensor([0.0, 1 - 2.0**-53])
    got = stats_of(logits, params)
    assert (got.token != MASK).all()
    if temperature == 0.0:
        without = logits.clone()
        without[:, MASK] = -torch.inf
        assert torch.equal(got.token, without.argmax(1))
    share = torch.softmax(logits, 1).gather(1, got.token.unsqueeze(1)).squeeze(1)
    if not settings:
        torch.testing.assert_close(got.confidence, share)
    assert (got.confidence <= 0.5).all()


@pytest.mark.parametrize("mask", [0, VOCAB - 1])
def test_mask_at_the_edge_of_the_vocabulary_is_not_drawn(mask: int) -> None:
    logits = torch.randn(20, VOCAB)
    logits[:, mask] += 200
    for temperature in (0.0, 1.0):
        for extreme in (0.0, 1 - 2.0**-53):
            params = replace(make_params(20, temperature), draw=torch.full((20,), extreme, dtype=torch.float64))
            got = row_stats(logits, torch.clone, params, mask, False, False)
            assert (got.token != mask).all()


@pytest.mark.parametrize("n", [0, 1, 5, module.ROWS_PER_TILE, 2 * module.ROWS_PER_TILE + 3])
def test_any_number_of_rows_in_tiles(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TILE_LOGITS", 0)  # as of a large vocabulary
    logits = torch.randn(n, VOCAB)
    params = make_params(n, 0.8, 0.9, 5)
    calls: list[int] = []

    def head(x: torch.Tensor) -> torch.Tensor:
        calls.append(len(x))
        return x.clone()

    got = row_stats(logits, head, params, MASK, True, True)
    assert sum(calls) == n
    assert max(calls, default=0) <= module.ROWS_PER_TILE
    for field in (got.token, got.confidence, got.margin, got.entropy):
        assert field is not None
        assert field.shape == (n,)
    for r in range(n):
        one = stats_of(logits[r : r + 1], params.tile(r, r + 1))
        assert torch.equal(one.token, got.token[r : r + 1])
        assert torch.equal(one.confidence, got.confidence[r : r + 1])


def test_a_small_vocabulary_has_more_rows_in_a_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = 2 * module.ROWS_PER_TILE
    monkeypatch.setattr(module, "TILE_LOGITS", rows * VOCAB + VOCAB - 1)
    calls: list[int] = []
    head = lambda x: calls.append(len(x)) or x.clone()  # noqa: E731
    row_stats(torch.randn(3 * rows, VOCAB), head, make_params(3 * rows), MASK, False, False)
    assert calls == [module.ROWS_PER_TILE, rows, rows, 3 * rows - 2 * rows - module.ROWS_PER_TILE]
    assert module.rows_per_tile(126_464) == module.ROWS_PER_TILE


def test_bfloat16_logits_are_taken_in_float32() -> None:
    logits = (torch.randn(4, VOCAB) * 3).bfloat16()
    got = stats_of(logits, make_params(4))
    want = stats_of(logits.float(), make_params(4))
    assert got.confidence.dtype == torch.float32
    assert torch.equal(got.confidence, want.confidence)


def test_statistics_nobody_wants_are_absent() -> None:
    for n in (0, 3):
        got = stats_of(torch.randn(n, VOCAB), make_params(n), margin=False, entropy=False)
        assert got.margin is None
        assert got.entropy is None


def test_ties_go_to_the_lower_token() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, [6, 20]] = 2.0
    assert stats_of(logits, make_params(1)).token.tolist() == [6]
    assert stats_of(logits, make_params(1, top_k=1)).token.tolist() == [6]


@pytest.mark.parametrize(("top_p", "top_k"), [(1.0, 0), (0.8, 0), (1.0, 4)])
def test_sampling_frequencies_match_the_probabilities(top_p: float, top_k: int) -> None:
    n = 20_000
    row = torch.randn(VOCAB) * 2
    row[MASK] = row.max()
    params = make_params(n, 1.3, top_p, top_k)
    got = stats_of(row.expand(n, -1), params, margin=False, entropy=False)
    probs = torch.tensor(reference_probs(row, 1.3, top_p, top_k))
    probs[MASK] = 0
    probs /= probs.sum()
    share = torch.bincount(got.token, minlength=VOCAB) / n
    assert (share[probs == 0] == 0).all()
    error = (share - probs).abs()
    assert (error <= 4.5 * (probs * (1 - probs) / n).sqrt() + 1e-9).all()


def test_extreme_draws_hit_tokens_with_probability() -> None:
    logits = torch.full((2, VOCAB), -torch.inf)
    logits[:, [3, 8]] = 0.0
    params = replace(make_params(2, 1.0), draw=torch.tensor([0.0, 1 - 2.0**-53], dtype=torch.float64))
    assert stats_of(logits, params).token.tolist() == [3, 8]
