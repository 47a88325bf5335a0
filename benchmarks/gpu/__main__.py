"""GPU benchmark, one command: correctness, then the card's ceilings, then kernels, then engine steps and a profile.

``python -m benchmarks.gpu`` prints a short table last, writes JSON and a plot to --out, and a profile of one step into
docs/performance.md. It measures nothing if a test fails on the GPU. ``--dry-run`` runs the same code at tiny shapes
without a GPU, and its numbers mean nothing: kernels in Triton's interpreter, the engine (``--parts engine``) on CPU.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

if "--dry-run" in sys.argv and "engine" not in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

import torch
from tqdm import tqdm

from benchmarks.gpu import engine as engines
from benchmarks.gpu.kernels import FAMILIES, TINY, Bench
from benchmarks.gpu.report import Results
from benchmarks.gpu.timing import Ceilings, Clock, ceilings, facts
from tools.test_gpu import fingerprint, passed_before

ROOT = Path(__file__).resolve().parents[2]
OUT = ROOT / "benchmarks/results/gpu.json"
PAGE = ROOT / "docs/performance.md"


def correct(kernels_alone: bool) -> bool:
    """Run the GPU tests, unless they have passed with this source on this device."""
    if passed_before(torch.cuda.get_device_name(), kernels_alone):
        print(f"tests of source {fingerprint()} have passed on this device", flush=True)
        return True
    command = [sys.executable, "tools/test_gpu.py", *(["--no-engine"] if kernels_alone else [])]
    return subprocess.run(command, check=False, cwd=ROOT).returncode == 0


def measure_kernels(args: argparse.Namespace, clock: Clock, results: Results) -> None:
    """Every kernel, and other tile sizes where asked."""
    bench = Bench(clock, results.limits, twins=not args.no_twins)
    families, lengths, batches = (TINY, [40], [2]) if args.dry_run else (FAMILIES, args.lengths, [1, 16])
    with torch.no_grad():
        results.kernels += tqdm(bench.run(families, lengths, batches), desc="kernels", unit=" lines", mininterval=1)
        if args.tiles:
            results.tiles += [t for f in families for t in tqdm(bench.tiles(f, lengths[-1]), desc="tiles")]
    results.left_out += bench.left_out


def started(args: argparse.Namespace, results: Results) -> Iterator[engines.Engine]:
    """One engine after the other: families, backends, eager and graphs."""
    from vllm_d2cache.ops.backends import BackendError

    for family in args.families:
        if not engines.served(family):
            results.left_out.append(f"{family}: this version of the plugin does not serve it")
            continue
        config = engines.TINY[family] if args.dry_run else engines.CONFIGS[family]
        for backend in ["torch"] if args.dry_run else args.backends:
            for execution in args.execution:
                eager, dtype = execution == "eager", "float32" if args.dry_run else "bfloat16"
                longest = max(*args.lengths, 800 + max(args.canvases))
                with tempfile.TemporaryDirectory() as folder:
                    try:
                        llm = engines.start(config, Path(folder), backend, eager, longest, max(args.concurrency), dtype)
                    except BackendError as error:
                        results.left_out.append(f"{family} with {backend}: {error}")
                        continue
                    engine = engines.Engine(family, backend, llm)
                    if engine.execution == execution:
                        yield engine
                    else:
                        results.left_out.append(f"{family} with {execution}: this version runs {engine.execution}")
                    engines.close(llm)
                    del engine, llm


def measure_engine(args: argparse.Namespace, results: Results) -> None:
    """Every case with every engine, until the time is over."""
    cases = engines.cases(args.policies, args.lengths, args.concurrency, args.workloads, args.canvases)
    end = time.monotonic() + 60 * args.minutes
    for engine in started(args, results):
        label = f"{engine.family} {engine.backend} {engine.execution}"
        for case in tqdm(cases, desc=label, unit=" cases"):
            if time.monotonic() > end:
                results.left_out.append(f"{label}: {case.policy}, {case.workload}, {len(case.prompts)}: --minutes over")
                continue
            results.steps.append(engine.measure(case, results.limits, args.steps))
        if not results.profile:
            typical = engines.Case("d2cache", "", [min(1024, *args.lengths) - args.canvases[0]], args.canvases[0])
            results.profile = engine.profile(typical)


def arguments() -> argparse.Namespace:
    """From the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--parts", nargs="+", choices=("kernels", "engine"), default=["kernels", "engine"])
    add("--lengths", type=int, nargs="+", default=[512, 1024, 2048, 4096], help="T at batch 1")
    add("--concurrency", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64])
    add("--workloads", nargs="+", choices=("gsm8k", "humaneval"), default=["gsm8k", "humaneval"])
    add("--canvases", type=int, nargs="+", default=[256, 512])
    add("--families", nargs="+", choices=tuple(engines.CONFIGS), default=list(engines.CONFIGS))
    add("--policies", nargs="+", default=["full", "d2cache", "dual", "dllm_cache"])
    add("--backends", nargs="+", choices=("triton", "xformers", "torch"), default=["triton"])
    add("--execution", nargs="+", choices=("eager", "graphs"), default=["graphs", "eager"])
    add("--steps", type=int, default=20, help="measured in each case")
    add("--minutes", type=float, default=60, help="no further engine case begins after this time")
    add("--no-twins", action="store_true", help="do not time the PyTorch twins")
    add("--tiles", action="store_true", help="also time other tile sizes of the attention kernels")
    add("--out", type=Path, default=OUT)
    add("--dry-run", action="store_true", help="tiny shapes on CPU; nothing is written")
    args = parser.parse_args()
    if args.dry_run:
        args.lengths, args.concurrency, args.canvases, args.steps = [48, 64], [1, 3], [16, 32], 2
        args.families, args.execution = ["LLaDA-8B"], ["eager"]
        if args.parts == ["kernels", "engine"]:
            args.parts = ["kernels"]
    return args


def main() -> None:
    """See the module."""
    args = arguments()
    if not args.dry_run and not torch.cuda.is_available():
        sys.exit("no GPU: nothing to measure (--dry-run shows that the code runs)")
    if not args.dry_run and not correct(args.parts == ["kernels"]):
        sys.exit("tests fail on this GPU: no number is worth printing")
    device = torch.device("cpu" if args.dry_run else "cuda")
    clock = Clock(device, dry=args.dry_run)
    limits: Ceilings = ceilings(clock)
    results = Results({**facts(device), "source": fingerprint()}, limits)
    if "kernels" in args.parts:
        measure_kernels(args, clock, results)
    if "engine" in args.parts:
        del clock  # and what it flushes the cache with
        measure_engine(args, results)
    if not args.dry_run:
        results.write(args.out)
        results.plot(args.out.with_suffix(".png"))
        if results.profile:
            results.document(PAGE)
    results.show()
    if args.dry_run:
        print("dry run: these numbers mean nothing, nothing written")
    else:
        print(f"written to {args.out} and {args.out.with_suffix('.png')}")


if __name__ == "__main__":
    main()
