"""Choice of the backend at start-up: what was asked for runs and agrees with the PyTorch twin, or says why not."""

from __future__ import annotations

import importlib.util

import torch

from vllm_d2cache.ops import dispatch
from vllm_d2cache.ops.paged_attention import (
    AttentionMaps,
    AttentionShape,
    MapPlan,
    PagedLayout,
    paged_attention,
    write_kv,
)


class BackendError(RuntimeError):
    """The backend that was asked for cannot run; the message has every reason."""


def select_backend(backend: str | None, device: torch.device, shape: AttentionShape) -> str:
    """Check ``backend`` and use it on ``device``; None = torch on CPU, triton elsewhere. There is no fallback.

    Returns:
        its name.

    Raises:
        BackendError: it cannot run here.
    """
    name = backend or ("torch" if device.type == "cpu" else "triton")
    found = reasons(name, device, shape)
    if found:
        listed = "".join(f"\n  - {reason}" for reason in found)
        instead = "torch" if device.type == "cpu" or name == "triton" else "triton or torch"
        raise BackendError(
            f"attention_backend {name!r} cannot run on {device}:{listed}\nSet attention_backend to {instead}."
        )
    dispatch.choose(name, device)
    return name


def reasons(backend: str, device: torch.device, shape: AttentionShape) -> list[str]:
    """Why ``backend`` cannot run; empty if it can."""
    if backend == "torch":
        return []
    found = []
    if device.type != "cuda":
        found.append(f"it needs an NVIDIA GPU, the device is {device.type}")
    packages = ("triton", "xformers") if backend == "xformers" else ("triton",)
    found += [f"{name} is not installed" for name in packages if importlib.util.find_spec(name) is None]
    if found:
        return found
    if backend == "xformers":
        from vllm_d2cache.ops import xformers_attention

        found += xformers_attention.prepare(device, shape)
    return found or disagreement(backend, device, shape)


def disagreement(backend: str, device: torch.device, shape: AttentionShape) -> list[str]:
    """Run the backend on a few rows and compare with the twin: no kernel fails for the first time under a request."""
    before = dispatch.chosen(device)
    results = []
    try:
        for name in ("torch", backend):
            dispatch.choose(name, device)
            results.append(_small_batch(device, shape))
    except Exception as error:  # whatever a compiler or driver raises is a reason
        lines = str(error).strip().splitlines() or [""]
        return [f"a small batch raised {type(error).__name__}: {lines[0]}"]
    finally:
        dispatch.choose(before, device)
    (want, want_maps), (got, got_maps) = results
    allowed = 1e-3 if shape.dtype == torch.float32 else 5e-2
    found = []
    for what, mine, other, limit in (("outputs", got, want, allowed), ("maps", got_maps, want_maps, 1e-3)):
        off = float((mine.float() - other.float()).abs().max())
        if not off <= limit:
            found.append(f"its {what} of a small batch are off by {off:.2g}, more than {limit:g}")
    return found


def _small_batch(device: torch.device, shape: AttentionShape) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and maps of seven rows of two requests, by the backend chosen now; the same numbers in every call."""
    size, head = shape.block_size, shape.head_size
    generator = torch.Generator().manual_seed(0)
    lengths, counts = [size + 1, 2 * size], [3, 4]
    table = torch.tensor([[3, 1, 0], [2, 4, 0]], dtype=torch.int32, device=device)
    cache = torch.zeros(shape.kv_heads, 5, size, 2 * head, dtype=shape.dtype, device=device).transpose(0, 1)
    slots = []
    for r, length in enumerate(lengths):
        position = torch.arange(length, device=device)
        slot = table[r, position // size].long() * size + position % size
        content = torch.randn(2, length, shape.kv_heads, head, generator=generator).to(device, shape.dtype)
        write_kv(cache, content[0], content[1], slot)
        slots.append(slot[: counts[r]])
    layout = PagedLayout(counts, lengths, table, [-1, -1], torch.cat(slots))
    query = torch.randn(sum(counts), shape.heads, head, generator=generator).to(device, shape.dtype)
    plan = MapPlan.pack([(n, t) for n, t in zip(counts, lengths, strict=True)])
    maps = AttentionMaps(plan, torch.zeros(plan.elements, device=device))
    output = torch.zeros_like(query)
    paged_attention(query, cache, layout, head**-0.5, output, maps)
    return output, maps.memory
