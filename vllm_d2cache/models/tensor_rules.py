"""Which tensors a checkpoint must have, by its family's list: the same sentences at the start and from doctor."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

# A buffer that some tools save; it follows from config.json.
REDUNDANT = "rotary_emb.inv_freq"

# What weights that are not quantised may be stored as; and the types by their names in safetensors files.
FLOATS = ("float64", "float32", "float16", "bfloat16")
_STORED = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
    "I16": "int16", "I8": "int8", "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "C64": "complex64",
}  # fmt: skip

Shapes = Mapping[str, tuple[int, ...]]


def tensor_problem(name: str, shape: tuple[int, ...], expected: Shapes, architecture: str) -> str | None:
    """What is wrong with one tensor of an unquantised checkpoint; None if it is as expected."""
    if name not in expected:
        return f"the checkpoint has a tensor {name} that {architecture} does not know"
    if tuple(shape) != expected[name]:
        return f"the checkpoint's tensor {name} has the shape {tuple(shape)}; config.json asks for {expected[name]}"
    return None


def dtype_problem(name: str, dtype: str) -> str | None:
    """Why one tensor of an unquantised checkpoint holds no weights; None if it does.

    Args:
        dtype: PyTorch's name of it, or that of safetensors files.
    """
    found = _STORED.get(dtype, dtype.removeprefix("torch."))
    if found in FLOATS:
        return None
    return f"the checkpoint's tensor {name} has the dtype {found} (not quantised, it must be {', '.join(FLOATS)})"


def twice_problem(name: str, files: tuple[str, str] | None = None) -> str:
    """What is wrong with a tensor that comes twice: one of the two would be served, and nobody knows which.

    Args:
        files: that hold it, where they are known.
    """
    where = f" ({' and '.join(files)})" if files else ""
    return f"the checkpoint has the tensor {name} in two files{where}; remove the one that does not belong to it"


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
