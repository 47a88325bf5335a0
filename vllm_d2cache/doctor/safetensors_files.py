"""Whether a directory's weights are all there, from the headers of its safetensors files. No tensor is read."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass, field
from pathlib import Path

_LONGEST_HEADER = 100 << 20  # bytes; what the safetensors library accepts


@dataclass
class Weights:
    """What the headers say.

    Attributes:
        problems: why the weights cannot be loaded; empty if they can.
        shapes: of every tensor, by its name.
        num_bytes: of all tensors together, as stored.
        dtypes: safetensors names of their types.
    """

    problems: list[str] = field(default_factory=list)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    num_bytes: int = 0
    dtypes: set[str] = field(default_factory=set)


def read_weights(directory: Path) -> Weights:
    """Check the index, if there is one, and every file."""
    weights = Weights()
    index = directory / "model.safetensors.index.json"
    expected: dict[str, str] | None = None
    if index.is_file():
        try:
            expected = {str(k): str(v) for k, v in json.loads(index.read_text())["weight_map"].items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            weights.problems.append(f"{index.name}: cannot be read ({error!r})")
            return weights
    paths = sorted({directory / name for name in expected.values()} if expected else directory.glob("*.safetensors"))
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
        seen.update(dict.fromkeys(names, path.name))
    if expected is not None and not weights.problems:
        gone = [name for name, file in expected.items() if seen.get(name) != file]
        if gone:
            weights.problems.append(f"{len(gone)} tensors of the index are in no file, e.g. {gone[0]}")
    return weights


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
            dtypes = {str(entry["dtype"]) for entry in tensors.values()}
            shapes = {name: tuple(map(int, entry["shape"])) for name, entry in tensors.items()}
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise ValueError("has a broken header") from error
    if 8 + length + end != size:
        raise ValueError(f"has {size} bytes and should have {8 + length + end}: download it again")
    weights.num_bytes += end
    weights.dtypes |= dtypes
    weights.shapes |= shapes
    return list(tensors)
