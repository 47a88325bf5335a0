"""The counter-based generator against plain Python integers."""

from __future__ import annotations

import torch

from vllm_d2cache.ops.random import uniform

MASK = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15


def mix(x: int) -> int:
    """The finaliser of splitmix64 on unsigned Python integers."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def uniform_in_python(seed: int, step: int, position: int) -> float:
    state = mix((seed + GOLDEN) & MASK)
    state = mix((state + step * GOLDEN) & MASK)
    state = mix((state + position * GOLDEN) & MASK)
    return (state >> 11) * 2.0**-53


def draw(triples: list[tuple[int, int, int]]) -> torch.Tensor:
    return uniform(*(torch.tensor(column) for column in zip(*triples, strict=True)))


def test_finaliser_gives_the_published_splitmix64_vector() -> None:
    """First outputs of splitmix64 seeded with 1234567, as printed with its reference implementation."""
    want = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert [mix((1234567 + (i + 1) * GOLDEN) & MASK) for i in range(3)] == want


def test_matches_unsigned_python_integers() -> None:
    triples = [
        (0, 0, 0),
        (1, 2, 3),
        (-1, 0, 5),
        ((1 << 63) - 1, 7, 4095),
        (-(1 << 63), 255, 1),
        (123456789, 1 << 20, 1 << 30),
    ]
    got = draw(triples)
    assert got.dtype == torch.float64
    assert got.tolist() == [uniform_in_python(*t) for t in triples]


def test_range_and_uniformity() -> None:
    n = 20_000
    values = uniform(torch.full((n,), 42), torch.arange(n) % 100, torch.arange(n) // 100)
    assert values.min() >= 0
    assert values.max() < 1
    counts = torch.histc(values, 20, 0, 1)
    chi_square = ((counts - n / 20) ** 2 / (n / 20)).sum()
    assert chi_square < 44  # 19 degrees of freedom: exceeded once in a thousand
    assert values.unique().numel() == n


def test_neighbouring_counters_are_uncorrelated() -> None:
    n = 10_000
    zero = torch.zeros(n, dtype=torch.int64)
    by_position = uniform(zero, zero, torch.arange(n))
    by_step = uniform(zero, torch.arange(n), zero)
    by_seed = uniform(torch.arange(n), zero, zero)
    for values in (by_position, by_step, by_seed):
        pairs = torch.stack([values[:-1], values[1:]])
        assert torch.corrcoef(pairs)[0, 1].abs() < 0.04
    assert not torch.equal(by_position, by_step)


def test_depends_on_its_own_triple_alone() -> None:
    triples = [(i * 7919, i % 5, i % 11) for i in range(37)]
    together = draw(triples)
    assert together.tolist() == [float(draw([t])[0]) for t in triples]
    assert torch.equal(together.flip(0), draw(triples[::-1]))
