"""Which tensors a checkpoint must have, by its family's list: the same sentences at the start and from doctor."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

# A buffer that some tools save; it follows from config.json.
REDUNDANT = "rotary_emb.inv_freq"

Shapes = Mapping[str, tuple[int, ...]]


def tensor_problem(name: str, shape: tuple[int, ...], expected: Shapes, architecture: str) -> str | None:
    """What is wrong with one tensor of an unquantised checkpoint; None if it is as expected."""
    if name not in expected:
        return f"the checkpoint has a tensor {name} that {architecture} does not know"
    if tuple(shape) != expected[name]:
        return f"the checkpoint's tensor {name} has the shape {tuple(shape)}; config.json asks for {expected[name]}"
    return None


def missing_problem(found: Iterable[str], expected: Shapes, not_needed: str | None) -> str | None:
    """Which tensors are missing; None if all are there.

    Args:
        not_needed: a tensor that may be missing: the head of a checkpoint whose head is its embedding.
    """
    missing = sorted(set(expected) - set(found) - {not_needed})
    return f"the checkpoint lacks {', '.join(missing)}" if missing else None


def missing_modules(found: Iterable[str], expected: Shapes, not_needed: str | None) -> str | None:
    """The same of a quantised checkpoint, which has other tensors: each module must have some."""
    there = {name.rpartition(".")[0] for name in found}
    missing = sorted({name for name in expected if name.rpartition(".")[0] not in there} - {not_needed})
    return f"the checkpoint lacks {', '.join(missing)} in any form" if missing else None
