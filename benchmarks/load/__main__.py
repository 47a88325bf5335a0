"""Load with everything that clients do: mixed requests, aborts, bad requests and stops, against a real server.

    python -m benchmarks.load --requests 2000 --concurrency 64 --out benchmarks/results/load

Starts `vllm serve models/tiny-llada`, asks every distinct request alone, then sends --requests of them at --concurrency
in random order, some of which hang up midway or are not acceptable. Each answer is compared with that of the same
request alone. Afterwards the server must hold no request and no KV block, all of its places must be free, and its
memory must not have grown. Exit status 1 if any of this is not so. Everything is bounded: requests, concurrency, each
request's time.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
from pathlib import Path

import numpy as np

from benchmarks.load.report import as_json, markdown, plot
from benchmarks.load.run import Plan, load
from benchmarks.machine import machine
from tests.e2e.server import TINY, serve
from vllm_d2cache.decoders.frequencies import count_frequencies


def frequencies(directory: Path) -> str:
    """A table for decoder pc: some tokens are frequent, others are not."""
    size = json.loads(Path(TINY, "config.json").read_text())["embedding_size"]
    path = directory / "frequencies.npy"
    np.save(path, count_frequencies([[token] * (1 + token % 7) for token in range(size)], size))
    return str(path)


def main() -> int:
    """Run and report; 1 if there was a problem."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--distinct", type=int, default=96, help="good requests to draw from (default: 96)")
    parser.add_argument("--places", type=int, default=64, help="the server's --max-num-seqs (default: 64)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write OUT.json, OUT.md and OUT.png")
    args = parser.parse_args()

    plan = Plan(args.requests, args.concurrency, args.distinct, args.seed, args.places)
    with tempfile.TemporaryDirectory() as directory:
        options = {"d2cache": {"token_frequencies": frequencies(Path(directory))}}
        flags = ("--max-num-seqs", str(args.places), "--additional-config", json.dumps(options))
        with serve(Path(directory, "log"), *flags) as server:
            report = asyncio.run(load(server.url, server.process.pid, plan))
    report["machine"] = machine()
    print(markdown(report))
    print("\n".join(report["problems"]))
    if args.out:
        args.out.with_suffix(".json").write_text(as_json(report))
        args.out.with_suffix(".md").write_text(markdown(report))
        plot(report, args.out.with_suffix(".png"))
    return 1 if report["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())
