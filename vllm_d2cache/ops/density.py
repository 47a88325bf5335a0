"""Certainty density: how much known text lies around each canvas slot (docs/methods/d2cache.md, section 3.2)."""

from __future__ import annotations

import math

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
    rows, width = known.shape
    known = ~known if masks else known
    reach = math.ceil(min(REACH_IN_SIGMAS * float(sigma.max()), 2 * width))
    length = canvas_len.unsqueeze(1)
    slot = torch.arange(-reach, width + reach, device=known.device).unsqueeze(0)
    inside = known.gather(1, slot.clamp(0, width - 1).expand(rows, -1))
    last = known.gather(1, (length - 1).clamp(min=0))
    extended = torch.where(slot < 0, slot >= -length, torch.where(slot < length, inside, last & (slot < 2 * length)))

    distance = torch.arange(-reach, reach + 1, device=known.device, dtype=torch.float64)
    safe_sigma = sigma.double().clamp(min=1e-6).unsqueeze(1)
    kernel = torch.exp(-0.5 * (distance / safe_sigma) ** 2)  # [R, 2 * reach + 1]
    # A wider row of the batch must not lend its reach to the others.
    kernel *= distance.abs() <= REACH_IN_SIGMAS * safe_sigma
    norm = _normaliser(length, safe_sigma)
    windows = extended.double().unfold(1, 2 * reach + 1, 1)  # [R, G, 2 * reach + 1], a view
    step = max(1, _TILE_ELEMENTS // max(1, width * (2 * reach + 1)))
    slots = max(1, _TILE_ELEMENTS // (2 * reach + 1))  # the product copies its windows
    tiles = [
        torch.cat([torch.bmm(x, kernel[i : i + step].unsqueeze(2)) for x in windows[i : i + step].split(slots, 1)], 1)
        for i in range(0, rows, step)
    ]
    density = (torch.cat(tiles).squeeze(2) / norm).float()
    density = torch.where(sigma.unsqueeze(1) > 0, density, 1.0)
    return density * (torch.arange(width, device=known.device) < length)


def _normaliser(length: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """[R, 1] float64: the kernel's sum over distances -3G .. 3G - 1."""
    half = math.ceil(min(REACH_IN_SIGMAS * float(sigma.max()), int(3 * length.max())))
    d = torch.arange(-half, half + 1, device=sigma.device, dtype=torch.float64)
    terms = torch.exp(-0.5 * (d / sigma) ** 2) * ((d >= -3 * length) & (d < 3 * length))
    return terms.sum(1, keepdim=True).clamp(min=1e-8)
