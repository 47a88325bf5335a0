"""Certainty density: how much known text lies around each canvas slot (docs/methods/d2cache.md, section 3.2)."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import torch

from vllm_d2cache.ops.dispatch import dispatched

# exp(-d^2 / 2 sigma^2) is below fp32's smallest normal number beyond this many sigmas: farther terms are zero.
REACH_IN_SIGMAS = 13.3
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
    (rows, width), device = known.shape, known.device
    # They change with the requests of a batch alone, and are worked out when these do.
    terms = _terms(tuple(canvas_len.tolist()), tuple(sigma.tolist()), width, device)
    inside = known.gather(1, terms.source)
    # A mask is unknown: of two flags the one is greater where it alone is True.
    seen = terms.seen > inside if masks else terms.seen & inside
    windows = (seen | terms.known).double().unfold(1, terms.weights.shape[1], 1)  # a view
    step = max(1, _TILE_ELEMENTS // max(1, width * terms.weights.shape[1]))
    slots = max(1, _TILE_ELEMENTS // terms.weights.shape[1])  # the product copies its windows
    if rows <= step and width <= slots:
        sums = torch.bmm(windows, terms.weights)
    else:
        tiles = [
            torch.cat([torch.bmm(x, terms.weights[i : i + step]) for x in windows[i : i + step].split(slots, 1)], 1)
            for i in range(0, rows, step)
        ]
        sums = torch.cat(tiles)
    return torch.where(terms.applies, (sums.squeeze(2) / terms.norm).float(), terms.otherwise)


class _Terms(NamedTuple):
    """What a density is made of beside the text; E columns of the extended canvas, W weights."""

    source: torch.Tensor  # [R, E] int64, slot whose flag counts
    seen: torch.Tensor  # [R, E] bool, whether it does
    known: torch.Tensor  # [R, E] bool, known whatever the text is
    weights: torch.Tensor  # [R, W, 1] float64
    norm: torch.Tensor  # [R, 1] float64
    applies: torch.Tensor  # [R, G] bool, where there is a density;
    otherwise: torch.Tensor  # [R, G] float32: elsewhere


@lru_cache(maxsize=8)
def _terms(canvas_len: tuple[int, ...], sigma: tuple[float, ...], width: int, device: torch.device) -> _Terms:
    reach = math.ceil(min(REACH_IN_SIGMAS * max(sigma), 2 * width))
    length = torch.tensor(canvas_len, device=device).unsqueeze(1)
    wide = torch.tensor(sigma, device=device).unsqueeze(1)
    slot = torch.arange(-reach, width + reach, device=device).unsqueeze(0)
    source = slot.clamp(min=0).minimum((length - 1).clamp(min=0))
    distance = torch.arange(-reach, reach + 1, device=device, dtype=torch.float64)
    safe = wide.double().clamp(min=1e-6)
    weights = torch.exp(-0.5 * (distance / safe) ** 2)
    # A wider row of the batch must not lend its reach to the others.
    weights *= distance.abs() <= REACH_IN_SIGMAS * safe
    seen, known = (slot >= 0) & (slot < 2 * length), (slot < 0) & (slot >= -length)
    in_canvas = slot[:, reach : reach + width] < length
    norm = _normaliser(length, safe)
    return _Terms(source, seen, known, weights.unsqueeze(2), norm, in_canvas & (wide > 0), in_canvas.float())


def _normaliser(length: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """[R, 1] float64: the kernel's sum over distances -3G .. 3G - 1."""
    half = math.ceil(min(REACH_IN_SIGMAS * float(sigma.max()), int(3 * length.max())))
    d = torch.arange(-half, half + 1, device=sigma.device, dtype=torch.float64)
    terms = torch.exp(-0.5 * (d / sigma) ** 2) * ((d >= -3 * length) & (d < 3 * length))
    return terms.sum(1, keepdim=True).clamp(min=1e-8)
