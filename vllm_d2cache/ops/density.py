"""Certainty density: how much known text lies around each canvas slot (docs/methods/d2cache.md, section 3.2)."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import torch

from vllm_d2cache.ops.columns import first_columns, numbers_of
from vllm_d2cache.ops.dispatch import dispatched

# exp(-d^2 / 2 sigma^2) is below fp32's smallest normal number beyond this many sigmas: farther terms are zero.
REACH_IN_SIGMAS = 13.3
# One line of a product has the sums of so many slots, a power of two; fewer where weights would be more than these.
_MOST_SLOTS = 64
_WEIGHT_ELEMENTS = 1 << 18
_TILE_ELEMENTS = 1 << 21


@dispatched("vllm_d2cache.ops.triton.density")
def certainty_density(
    known: torch.Tensor, canvas_len: torch.Tensor, sigma: torch.Tensor, masks: bool = False
) -> torch.Tensor:
    """Gaussian-weighted share of known slots around every slot.

    The canvas is extended by its own length on both sides: known on the left (the prompt), a copy of the last slot's
    flag on the right. Sums run in float64 so that a row's result does not depend on the width the batch is padded to.

    Args:
        known: [R, G] bool, True where the slot holds a token; columns past a row's canvas are ignored.
        canvas_len: [R] int64, slots of each row.
        sigma: [R] float32 width in slots; 0 gives a density of one everywhere.
        masks: ``known`` says the opposite, which slots are masked.

    Returns:
        [R, G] float32, 0 past a row's canvas.
    """
    # They change with the requests of a batch alone, and are worked out when these do.
    terms = _terms(numbers_of(canvas_len), numbers_of(sigma), known.shape[1], known.device)
    inside = known.gather(1, terms.source)
    extended = torch.where(inside, *((terms.if_masked, terms.if_known) if masks else (terms.if_known, terms.if_masked)))
    sums = extended @ terms.whole if terms.whole is not None else _weighted(extended, terms.weights)
    density = (first_columns(sums, known.shape[1]) / terms.norm).float()
    return density if terms.everywhere else torch.where(terms.applies, density, terms.otherwise)


class _Terms(NamedTuple):
    """What a density is made of beside the text; E columns of the extended canvas."""

    source: torch.Tensor  # [R, E] int64, slot whose flag counts
    if_known: torch.Tensor  # [R, E] float64, 1 where the column is known if its slot is; 0 behind the extension
    if_masked: torch.Tensor  # [R, E] float64, 1 where it is known whatever the text is
    # [1 or R, s + 2 * reach, s] float64: of a stretch of s slots and what lies around them, in the sum of each slot.
    # One for all where they have the same sigma.
    weights: torch.Tensor
    whole: torch.Tensor | None  # [E, G] float64, these as a matrix where one of them makes all of a line
    norm: torch.Tensor  # [R, 1] float64
    applies: torch.Tensor  # [R, G] bool, where there is a density;
    otherwise: torch.Tensor  # [R, G] float32: elsewhere
    everywhere: bool  # whether there is no elsewhere


def _weighted(extended: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """[R, slots] float64: weighted sums of ``extended`` [R, E], a product of stretches and weights."""
    sigmas, around, slots = weights.shape
    stretches = extended.unfold(1, around, slots)  # [R, stretches, around]: a view, which a product copies
    rows, each, _ = stretches.shape
    at_once = max(1, _TILE_ELEMENTS // around)
    if rows * each <= at_once:
        return _product(stretches, weights).view(rows, -1)
    step = max(1, at_once // each)
    parts = [(stretches[i : i + step], weights[i : i + step] if sigmas > 1 else weights) for i in range(0, rows, step)]
    sums = ([_product(x, own) for x in part.split(at_once, 1)] for part, own in parts)
    return torch.cat([torch.cat(of_part, 1).flatten(1) for of_part in sums])


def _product(stretches: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """[R, n, s]: of [R, n, s + 2 * reach] and [1 or R, s + 2 * reach, s]."""
    if weights.shape[0] > 1:
        return torch.bmm(stretches, weights)
    return (stretches.reshape(-1, weights.shape[1]) @ weights[0]).view(*stretches.shape[:2], -1)


@lru_cache(maxsize=8)
def _terms(canvas_len: tuple[int, ...], sigma: tuple[float, ...], width: int, device: torch.device) -> _Terms:
    reach = math.ceil(min(REACH_IN_SIGMAS * max(sigma), 2 * width))
    length = torch.tensor(canvas_len, device=device).unsqueeze(1)
    wide = torch.tensor(sigma, device=device).unsqueeze(1)
    columns = -(-width // _MOST_SLOTS) * _MOST_SLOTS
    slot = torch.arange(-reach, columns + reach, device=device).unsqueeze(0)
    source = slot.clamp(min=0).minimum((length - 1).clamp(min=0))
    seen, known = (slot >= 0) & (slot < 2 * length), (slot < 0) & (slot >= -length)
    in_canvas, safe = slot[:, reach : reach + width] < length, wide.double().clamp(min=1e-6)
    weights = _weights(safe[:1] if len(set(sigma)) == 1 else safe, reach)
    norm = _normaliser(length, safe)
    applies = in_canvas & (wide > 0)
    whole = weights[0] if weights.shape[:2] == (1, slot.shape[1]) else None
    flags = ((seen | known).double(), known.double())
    return _Terms(source, *flags, weights, whole, norm, applies, in_canvas.float(), bool(applies.all()))


def _weights(sigma: torch.Tensor, reach: int) -> torch.Tensor:
    """As of :class:`_Terms`, for ``sigma`` [m, 1] float64: _WEIGHT_ELEMENTS at most, or of one slot."""
    slots = _MOST_SLOTS
    while slots > 1 and len(sigma) * slots * (slots + 2 * reach) > _WEIGHT_ELEMENTS:
        slots //= 2
    slot = torch.arange(slots + 2 * reach, device=sigma.device, dtype=torch.float64) - reach
    distance, wide = slot.unsqueeze(1) - slot[reach : reach + slots], sigma.unsqueeze(2)
    # A wider row of the batch must not lend its reach to the others.
    return torch.exp(-0.5 * (distance / wide) ** 2) * (distance.abs() <= REACH_IN_SIGMAS * wide)


def _normaliser(length: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """[R, 1] float64: the kernel's sum over distances -3G .. 3G - 1."""
    half = math.ceil(min(REACH_IN_SIGMAS * float(sigma.max()), int(3 * length.max())))
    d = torch.arange(-half, half + 1, device=sigma.device, dtype=torch.float64)
    terms = torch.exp(-0.5 * (d / sigma) ** 2) * ((d >= -3 * length) & (d < 3 * length))
    return terms.sum(1, keepdim=True).clamp(min=1e-8)
