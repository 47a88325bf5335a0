"""GPU benchmark, one command: correctness, then the card's ceilings, then kernels, then engine steps.

``python -m benchmarks.gpu`` prints a short table last and writes JSON and a plot to --out. It measures nothing if the
kernels' tests fail. ``--dry-run`` runs the same code in Triton's interpreter at tiny shapes, without a GPU: its numbers
mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

if "--dry-run" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

import torch

from benchmarks.gpu.kernels import FAMILIES, TINY, Bench, Line
from benchmarks.gpu.timing import Ceilings, Clock, ceilings, facts

RESULTS = Path(__file__).resolve().parents[1] / "results"


def correct() -> bool:
    """Run the kernels' tests on the GPU."""
    command = [sys.executable, "-m", "pytest", "tests/triton", "-q", "-p", "no:cacheprovider"]
    return subprocess.run(command, check=False).returncode == 0


def engine_steps(args: argparse.Namespace, limits: Ceilings) -> list[Any]:
    """Batch 1 at every length, then every concurrency at one length; full recompute and d2cache."""
    from benchmarks.gpu.engine import CONFIGS, Engine, served

    steps = []
    for family in CONFIGS:
        if not served(family):
            print(f"{family}: this version of the plugin does not serve it", flush=True)
            continue
        with tempfile.TemporaryDirectory() as directory:
            engine = Engine(family, args.backend, Path(directory), max(args.lengths), max(args.concurrency))
            for policy in ("full", "d2cache"):
                cases = [(1, length) for length in args.lengths]
                cases += [(n, args.concurrency_length) for n in args.concurrency if n > 1]
                for requests, length in cases:
                    steps.append(engine.measure(policy, requests, length, limits))
                    print(steps[-1], flush=True)
            del engine
            torch.cuda.empty_cache()
    return steps


def report(lines: list[Line], steps: list[Any], limits: Ceilings, machine: dict[str, Any]) -> None:
    """A short table."""
    print(f"\n{machine}")
    print(f"ceilings: copy {limits.bytes_per_s / 1e9:.0f} GB/s, bf16 product {limits.flops_per_s / 1e12:.0f} TFLOP/s")
    print(f"{'kernel':24}{'family':10}{'reqs':>5}{'rows':>6}{'T':>7}{'ms':>9}{'x floor':>9}{'twin ms':>9}  other")
    for x in lines:
        twin = "" if x.twin_ms is None else f"{x.twin_ms:.3f}"
        other = "" if x.other_ms is None else f"{x.other} {x.other_ms:.3f}"
        print(
            f"{x.kernel:24}{x.family:10}{x.requests:5}{x.rows:6}{x.length:7}{x.ms:9.3f}{x.ratio:9.2f}{twin:>9}  {other}"
        )
    if steps:
        print(
            f"\n{'step':10}{'policy':9}{'reqs':>5}{'T':>6}{'rows':>8}{'ms':>8}{'x floor':>9}{'outside':>9}{'tok/s':>8}"
        )
    for s in steps:
        print(
            f"{s.family:10}{s.policy:9}{s.running:5}{s.length:6}{s.rows:8.0f}{s.step_ms:8.2f}{s.ratio:9.2f}"
            f"{s.outside:9.1%}{s.tokens_per_s:8.0f}"
        )


def plot(lines: list[Line], steps: list[Any], path: Path) -> None:
    """Time over floor: kernels left, engine steps right."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(14, 0.18 * max(len(lines), 20)))
    left.barh([f"{x.kernel} {x.family} {x.requests}x{x.rows}/{x.length}" for x in lines], [x.ratio for x in lines])
    left.set_xscale("log")
    left.set_xlabel("time / floor")
    left.tick_params(axis="y", labelsize=5)
    left.invert_yaxis()
    right.barh([f"{s.family} {s.policy} {s.requests}x{s.length}" for s in steps], [s.ratio for s in steps])
    right.set_xlabel("step / max(weight bytes / bandwidth, flops / rate)")
    right.tick_params(axis="y", labelsize=6)
    right.invert_yaxis()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048, 4096], help="T at batch 1")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--concurrency-length", type=int, default=1152, help="T of every request there")
    parser.add_argument("--backend", default="triton", choices=("triton", "xformers", "torch"))
    parser.add_argument("--no-engine", action="store_true", help="kernels alone: needs no vLLM")
    parser.add_argument("--no-twins", action="store_true", help="do not time the PyTorch twins")
    parser.add_argument("--tiles", action="store_true", help="also time other tile sizes of the attention kernels")
    parser.add_argument("--out", type=Path, default=RESULTS / "gpu.json")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes in the interpreter; nothing is written")
    args = parser.parse_args()

    if not args.dry_run and not torch.cuda.is_available():
        sys.exit("no GPU: nothing to measure (--dry-run shows that the code runs)")
    if not args.dry_run and not correct():
        sys.exit("the kernels' tests fail on this GPU: no number is worth printing")
    device = torch.device("cpu" if args.dry_run else "cuda")
    clock = Clock(device, dry=args.dry_run)
    limits, machine = ceilings(clock), facts(device)
    bench = Bench(clock, limits, twins=not args.no_twins)
    families, lengths, batches = (TINY, [40], [2]) if args.dry_run else (FAMILIES, args.lengths, [1, 16])
    lines = []
    with torch.no_grad():
        for line in bench.run(families, lengths, batches):
            lines.append(line)
            print(line, flush=True)
        tiles = [t for f in families for t in bench.tiles(f, lengths[-1])] if args.tiles else []
    for tile in tiles:
        print("tile", *tile)
    steps = [] if args.no_engine or args.dry_run else engine_steps(args, limits)
    report(lines, steps, limits, machine)
    if args.dry_run:
        print("dry run: these numbers mean nothing, nothing written")
        return
    args.out.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "machine": machine,
        "ceilings": asdict(limits),
        "kernels": [asdict(x) for x in lines],
        "tiles": tiles,
        "steps": [asdict(s) for s in steps],
    }
    args.out.write_text(json.dumps(content, indent=1) + "\n")
    plot(lines, steps, args.out.with_suffix(".png"))
    print(f"written to {args.out} and {args.out.with_suffix('.png')}")


if __name__ == "__main__":
    main()
