"""Certainty density: how much known text lies around each canvas slot (docs/methods/d2cache.md, section 3.2)."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import torch

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
    terms = _terms(tuple(canvas_len.tolist()), tuple(sigma.tolist()), known.shape[1], known.device)
    inside = known.gather(1, terms.source)
    # A mask is unknown: of two flags the one is greater where it alone is True.
    seen = terms.seen > inside if masks else terms.seen & inside
    extended = (seen | terms.known).double()
    if len(terms.widths) == 1:
        sums = _sums(extended, terms.widths[0])
    else:
        sums = extended[:, : extended.shape[1] - 2 * terms.reach].clone()
        for width in terms.widths:
            part = extended[width.rows, terms.reach - width.reach :]
            sums[width.rows] = _sums(part[:, : sums.shape[1] + 2 * width.reach], width)
    return torch.where(terms.applies, (sums[:, : known.shape[1]] / terms.norm).float(), terms.otherwise)


class _Width(NamedTuple):
    """The rows of one sigma."""

    rows: torch.Tensor  # [m] int64
    reach: int  # slots to either side that count
    weights: torch.Tensor  # [s + 2 * reach, s] float64: of a stretch of s slots and its surroundings, in each's sum


class _Terms(NamedTuple):
    """What a density is made of beside the text; E columns of the extended canvas."""

    source: torch.Tensor  # [R, E] int64, slot whose flag counts
    seen: torch.Tensor  # [R, E] bool, whether it does
    known: torch.Tensor  # [R, E] bool, known whatever the text is
    reach: int  # the widest
    widths: tuple[_Width, ...]
    norm: torch.Tensor  # [R, 1] float64
    applies: torch.Tensor  # [R, G] bool, where there is a density;
    otherwise: torch.Tensor  # [R, G] float32: elsewhere


def _sums(extended: torch.Tensor, width: _Width) -> torch.Tensor:
    """[m, slots] float64: weighted sums of rows that reach ``width.reach`` columns beyond their slots on either side.

    One product: a line of it is a stretch of slots with what lies around them, a column the sum of one of these slots.
    """
    weights = width.weights
    stretches = extended.unfold(1, len(weights), weights.shape[1])  # [m, stretches, columns of each]: a view
    rows, at_once = stretches.shape[0], max(1, _TILE_ELEMENTS // len(weights))  # the product copies its lines
    if rows * stretches.shape[1] <= at_once:
        return (stretches.reshape(-1, len(weights)) @ weights).view(rows, -1)
    return torch.cat([torch.cat([part @ weights for part in row.split(at_once)]).view(1, -1) for row in stretches])


@lru_cache(maxsize=8)
def _terms(canvas_len: tuple[int, ...], sigma: tuple[float, ...], width: int, device: torch.device) -> _Terms:
    rows: dict[float, list[int]] = {}
    for row, one in enumerate(sigma):
        rows.setdefault(one, []).append(row)
    most = _WEIGHT_ELEMENTS // len(rows)
    widths = tuple(
        _Width(torch.tensor(mine, device=device), *_weights(one, width, most, device)) for one, mine in rows.items()
    )
    reach, columns = max(w.reach for w in widths), -(-width // _MOST_SLOTS) * _MOST_SLOTS
    length = torch.tensor(canvas_len, device=device).unsqueeze(1)
    wide = torch.tensor(sigma, device=device).unsqueeze(1)
    slot = torch.arange(-reach, columns + reach, device=device).unsqueeze(0)
    source = slot.clamp(min=0).minimum((length - 1).clamp(min=0))
    seen, known = (slot >= 0) & (slot < 2 * length), (slot < 0) & (slot >= -length)
    in_canvas = slot[:, reach : reach + width] < length
    norm = _normaliser(length, wide.double().clamp(min=1e-6))
    return _Terms(source, seen, known, reach, widths, norm, in_canvas & (wide > 0), in_canvas.float())


@lru_cache(maxsize=16)
def _weights(sigma: float, width: int, most: int, device: torch.device) -> tuple[int, torch.Tensor]:
    """Reach of a sigma, and its weights as of :class:`_Width`: ``most``, or of one slot. Shared: never written."""
    reach, slots = math.ceil(min(REACH_IN_SIGMAS * sigma, 2 * width)), _MOST_SLOTS
    while slots > 1 and slots * (slots + 2 * reach) > most:
        slots //= 2
    safe = max(sigma, 1e-6)
    slot = torch.arange(slots + 2 * reach, device=device, dtype=torch.float64) - reach
    distance = slot.unsqueeze(1) - slot[reach : reach + slots]
    weights = torch.exp(-0.5 * (distance / safe) ** 2)
    return reach, weights * (distance.abs() <= min(reach, REACH_IN_SIGMAS * safe))


def _normaliser(length: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """[R, 1] float64: the kernel's sum over distances -3G .. 3G - 1."""
    half = math.ceil(min(REACH_IN_SIGMAS * float(sigma.max()), int(3 * length.max())))
    d = torch.arange(-half, half + 1, device=sigma.device, dtype=torch.float64)
    terms = torch.exp(-0.5 * (d / sigma) ** 2) * ((d >= -3 * length) & (d < 3 * length))
    return terms.sum(1, keepdim=True).clamp(min=1e-8)
