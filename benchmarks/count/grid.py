"""Prints how a layer's kernels fill a card, without one: ``python -m benchmarks.count.grid``, or ``make count``.

Programs of a refresh step at batch 1 in a CUDA graph: how many are started, and how many of them find rows of the
request to work on. And what each kernel takes of a processor on six architectures, compiled for each of them in a
process of its own: registers, shared memory, and bytes of local memory for what did not fit.

Each release of Triton is another compiler. The environment for CPUs has the newest one; those that come with vLLM's
CUDA builds are in the environments of `make test-cuda-wheels`, which asks each of them that nothing spills. There:

    .venv-cuda-0.33.0/bin/python -m benchmarks.count.grid --out benchmarks/results/grid-triton-3.8
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import triton

from tests.triton.hopper import ARCHITECTURES, TARGETS, Launch
from tests.triton.model_kernels import MODELS, GraphStep, Model, every_kernel, row_bound
from vllm_d2cache.ops.split import kv_heads_at_once, num_stretches
from vllm_d2cache.ops.triton.common import tile_shape
from vllm_d2cache.ops.triton.rollout import _COLUMNS

LENGTHS = (512, 1024, 2048)
# Of the rows that a request may have, those that it has; the least that benchmarks/budget_fill.py found with default
# options. The others are padding.
FILL = 0.67
KERNELS = {"_attention_kernel": "attention", "_map_kernel": "map", "_map_product_kernel": "rollout"}


def busy(programs: int, times: int, parts: int, live_tiles: int) -> int:
    """Of ``programs``, those that get a piece with rows in it. Tiles of rows that are not padding come first.

    Args:
        times: heads, or groups of them, for each of which all pieces are done.
        parts: of keys or positions, of each tile.
        live_tiles: tiles that are not padding.
    """
    return min(programs, times * parts * live_tiles)


def grids(model: Model, length: int) -> dict[str, Any]:
    """(live, started) programs of each kernel of :data:`KERNELS`, of one request of ``length`` positions."""
    shape, bound = model.shape, row_bound(length)
    found = GraphStep.make(shape, length).layer()
    started = {KERNELS[launch.name]: launch.grid[0] for launch in found if launch.name in KERNELS}
    rows, keys = tile_shape(shape.dtype)
    attention_rows = rows // (shape.heads // shape.kv_heads)
    groups = -(-shape.kv_heads // kv_heads_at_once(shape.heads, shape.kv_heads))
    used = round(FILL * bound)
    live = {
        "attention": busy(started["attention"], shape.kv_heads, num_stretches(length), -(-used // attention_rows)),
        "map": busy(started["map"], groups, -(-length // keys), -(-used // rows)),
        "rollout": busy(started["rollout"], 1, -(-length // _COLUMNS), 1),
    }
    return {kernel: [live[kernel], started[kernel]] for kernel in live}


def resources(architecture: int) -> Iterator[dict[str, Any]]:
    """Of every specialisation of every kernel of every model."""
    for name, model in MODELS.items():
        for launch in every_kernel(model, TARGETS[architecture]):
            yield {"model": name, "kernel": _kernel_name(launch), "architecture": launch.architecture, **_taken(launch)}


def _kernel_name(launch: Launch) -> str:
    """With what it was specialised for, where there is more than one kind."""
    name = launch.name.strip("_").removesuffix("_kernel").replace("_", " ")
    chosen = launch.constants
    kinds = {"SPLIT": "in parts", "SAMPLES": "sampled", "FILTERS": "filtered", "MARGIN": "margin", "ENTROPY": "entropy"}
    said = [kind for flag, kind in kinds.items() if chosen.get(flag) is True]
    return f"{name}, {', '.join(said)}" if said else name


def _taken(launch: Launch) -> dict[str, int]:
    return {
        "warps": launch.warps,
        "registers": launch.registers,
        "shared": launch.shared_memory,
        "local": launch.local_memory,
    }


def grid_table(found: list[dict[str, Any]]) -> str:
    """Markdown."""
    rows = ["| model | T | attention | map | rollout |", "|---|---|---|---|---|"]
    for line in found:
        cells = [f"{live} / {started}" for live, started in (line[kernel] for kernel in KERNELS.values())]
        rows.append(f"| {line['model']} | {line['length']} | {' | '.join(cells)} |")
    return "\n".join(rows)


def resource_table(found: list[dict[str, Any]]) -> str:
    """Markdown: registers a thread and KiB of shared memory, and spilled bytes where there are any."""
    heads = " | ".join(f"sm_{architecture}" for architecture in ARCHITECTURES)
    rows = [f"| model | kernel | warps | {heads} |", "|---" * (3 + len(ARCHITECTURES)) + "|"]
    cells: dict[tuple[str, str], dict[int, dict[str, int]]] = {}
    for line in found:
        by_architecture = cells.setdefault((line["model"], line["kernel"]), {})
        known = by_architecture.setdefault(line["architecture"], line)
        if line["registers"] > known["registers"]:
            by_architecture[line["architecture"]] = line  # the most that one of several takes
    for (model, kernel), by in cells.items():
        row = " | ".join(_cell(by[a]) if a in by else "-" for a in ARCHITECTURES)
        warps = max(line["warps"] for line in by.values())
        rows.append(f"| {model} | {kernel} | {warps} | {row} |")
    return "\n".join(rows)


def _cell(line: dict[str, int]) -> str:
    spilled = f", {line['local']} B spilled" if line["local"] else ""
    return f"{line['registers']}, {line['shared'] / 1024:.1f}{spilled}"


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/grid"))
    parser.add_argument("--architecture", type=int, choices=ARCHITECTURES, help="print what it takes there, as JSON")
    args = parser.parse_args()
    if args.architecture:
        print(json.dumps(list(resources(args.architecture))))
        return
    lines = [{"model": m, "length": t, **grids(MODELS[m], t)} for m in MODELS for t in LENGTHS]
    taken = []
    for architecture in ARCHITECTURES:
        command = [sys.executable, "-m", "benchmarks.count.grid", "--architecture", str(architecture)]
        taken += json.loads(subprocess.check_output(command, text=True))
    text = f"{grid_table(lines)}\n\nTriton {triton.__version__}:\n\n{resource_table(taken)}\n"
    print(text)
    args.out.with_name(f"{args.out.name}.md").write_text(text)
    written = {"triton": triton.__version__, "grids": lines, "resources": taken}
    args.out.with_name(f"{args.out.name}.json").write_text(json.dumps(written, indent=1) + "\n")


if __name__ == "__main__":
    main()
