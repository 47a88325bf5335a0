"""Whether a directory's weights are all there, from the headers of its safetensors files. No tensor is read."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm_d2cache.models.tensor_rules import REDUNDANT, twice_problem
from vllm_d2cache.options.json_files import object_in

_LONGEST_HEADER = 100 << 20  # bytes; what the safetensors library accepts
# Which files vLLM reads: where there are any of the first kind, no others.
_KINDS = (
    ("consolidated*.safetensors", "consolidated.safetensors.index.json"),
    ("*.safetensors", "model.safetensors.index.json"),
)


@dataclass
class Weights:
    """What the headers say.

    Attributes:
        problems: why the weights cannot be loaded; empty if they can.
        shapes: of every tensor, by its name.
        num_bytes: of all tensors together, as stored.
        dtypes: safetensors names of their types, by tensor.
    """

    problems: list[str] = field(default_factory=list)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    num_bytes: int = 0
    dtypes: dict[str, str] = field(default_factory=dict)


def read_weights(directory: Path) -> Weights:
    """Check the index, if there is one, and every file."""
    weights = Weights()
    pattern, index_name = next((kind for kind in _KINDS if any(directory.glob(kind[0]))), _KINDS[-1])
    expected: dict[str, str] | None = None
    if (directory / index_name).is_file():
        found = _read_index(directory / index_name)
        if isinstance(found, str):
            weights.problems.append(found)
            return weights
        expected = found
    paths = sorted({directory / name for name in expected.values()} if expected else directory.glob(pattern))
    if not paths:
        others = sorted(p.name for p in directory.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".gguf"))
        hint = f"; {', '.join(others[:3])} will not do: convert to safetensors" if others else ""
        weights.problems.append(f"no .safetensors file{hint}")
    seen: dict[str, str] = {}
    for path in paths:
        try:
            names = _read_header(path, weights)
        except (OSError, ValueError) as error:
            weights.problems.append(f"{path.name}: {error if isinstance(error, ValueError) else 'missing'}")
            continue
        again = [name for name in names if name in seen and not name.endswith(REDUNDANT)]
        if again:
            weights.problems.append(twice_problem(again[0], (seen[again[0]], path.name)))
        seen.update(dict.fromkeys(names, path.name))
    if expected is not None and not weights.problems:
        gone = [name for name, file in expected.items() if seen.get(name) != file]
        if gone:
            weights.problems.append(f"{len(gone)} tensors of the index are in no file, e.g. {gone[0]}")
    return weights


def readable(weights: Iterable[tuple[str, Any]], directory: Path) -> Iterator[tuple[str, Any]]:
    """The same tensors by name, as vLLM reads them; its errors have the words of :func:`read_weights`.

    Args:
        directory: of the checkpoint; its name on the hub if there is none.

    Raises:
        ValueError: a file cannot be read; names it.
    """
    try:
        yield from weights
    except Exception as error:  # of any kind: vLLM and its libraries look at nothing first
        problems = read_weights(directory).problems if directory.is_dir() else []
        if not problems:
            raise
        raise ValueError("the checkpoint's weights cannot be read: " + "; ".join(problems)) from error


def _read_index(path: Path) -> dict[str, str] | str:
    """Tensor -> file, or what is wrong with the index."""
    try:
        content = object_in(path.read_bytes(), path.name)
    except OSError as error:
        return f"{path.name} cannot be read: {error}"
    if isinstance(content, str):
        return content
    files = content.get("weight_map")
    if not isinstance(files, dict) or not files:
        return f"{path.name}: weight_map={_shown(files)} (must be an object that names the file of each tensor)"
    wrong = next((name for name, file in files.items() if not isinstance(file, str) or not file), None)
    if wrong is not None:
        return f"{path.name}: weight_map.{wrong}={_shown(files[wrong])} (must be the name of a file)"
    return files


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) < 100 else f"{text[:90]} ..."


def _read_header(path: Path, weights: Weights) -> list[str]:
    """Names of a file's tensors; adds their bytes and types.

    Raises:
        ValueError: the file is cut short, or is no safetensors file.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        (length,) = struct.unpack("<Q", prefix) if len(prefix) == 8 else (0,)
        if not 0 < length <= min(_LONGEST_HEADER, size - 8):
            raise ValueError("is no safetensors file, or cut short (a Git LFS pointer, a broken download?)")
        try:
            header = json.loads(file.read(length))
            tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
            end = max((int(entry["data_offsets"][1]) for entry in tensors.values()), default=0)
            dtypes = {name: str(entry["dtype"]) for name, entry in tensors.items()}
            shapes = {name: tuple(map(int, entry["shape"])) for name, entry in tensors.items()}
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError("has a broken header") from error
    if 8 + length + end != size:
        raise ValueError(f"has {size} bytes and should have {8 + length + end}: download it again")
    weights.num_bytes += end
    weights.dtypes |= dtypes
    weights.shapes |= shapes
    return list(tensors)
