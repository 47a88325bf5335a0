"""Step times on CPU: the engine's whole step against a bare forward pass, d2cache against full recompute.

Random weights, fp32, one token a step: one request at several prompt lengths, then several requests at the shortest of
them. Engine steps and bare forward passes of the same numbers of rows and keys alternate in one process, so that what
disturbs one disturbs the other; the bare model takes requests one after the other. Prints a table, writes JSON and a
plot to benchmarks/results/. Run as ``python -m benchmarks.cpu.step_speed``.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "3")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.cpu.bare import BareModel, Shape
from benchmarks.machine import caption, machine

RESULTS = Path(__file__).resolve().parents[1] / "results"
CANVAS = 64


@dataclass
class Row:
    """One line of the table; times are medians in milliseconds."""

    prompt: int
    policy: str
    rows: float
    keys: int
    step_ms: float
    forward_ms: float
    outside_ms: float
    bare_ms: float
    ratio_to_bare: float
    bare_map_ms: float  # the bare pass with attention written out and its maps kept; 0 where none are needed
    peak_rss_mb: float
    requests: int = 1
    speedup: float = 1.0
    bare_speedup: float = 1.0


def write_checkpoint(directory: Path, shape: Shape) -> None:
    """A LLaDA config and random weights of that shape."""
    from safetensors.torch import save_file

    config = {
        "architectures": ["LLaDAModelLM"],
        "model_type": "llada",
        "d_model": shape.width,
        "n_heads": shape.heads,
        "n_kv_heads": shape.heads,
        "n_layers": shape.layers,
        "mlp_hidden_size": shape.mlp,
        "vocab_size": shape.vocab,
        "embedding_size": shape.vocab,
        "max_sequence_length": 4096,
        "mask_token_id": shape.vocab - 1,
        "eos_token_id": shape.vocab - 2,
        "torch_dtype": "float32",
    }
    (directory / "config.json").write_text(json.dumps(config))
    model = BareModel(shape, 1)
    p = "model.transformer."
    tensors = {f"{p}wte.weight": model.embedding, f"{p}ff_out.weight": model.head, f"{p}ln_f.weight": model.norm}
    for i, (qkv, out, up, down) in enumerate(model.blocks):
        q, k, v = qkv.chunk(3)
        gate, up_proj = up.chunk(2)
        b = f"{p}blocks.{i}."
        named = {"q_proj": q, "k_proj": k, "v_proj": v, "attn_out": out, "ff_proj": gate, "up_proj": up_proj}
        named |= {"ff_out": down, "attn_norm": model.norm, "ff_norm": model.norm}
        tensors |= {f"{b}{name}.weight": tensor.clone() for name, tensor in named.items()}
    save_file(tensors, str(directory / "model.safetensors"))


class Meter:
    """Times the model's forward passes inside an engine, and notes what each step computed."""

    def __init__(self, engine: Any) -> None:
        worker = engine.engine_core.engine_core.model_executor.driver_worker.worker
        self.runner = worker.model_runner
        self.forward_s = 0.0
        self.rows = self.logits_rows = self.requests = 0
        model, stock = self.runner.model, self.runner.model.forward

        def forward(*args: Any, **kwargs: Any) -> torch.Tensor:
            self.rows = kwargs["input_ids"].shape[0]
            start = time.perf_counter()
            out = stock(*args, **kwargs)
            self.forward_s += time.perf_counter() - start
            step = self.runner.model_state.step
            # A piece of a prompt has no rows that decide.
            rows = None if step is None else step.rows
            self.logits_rows, self.requests = (0, 0) if rows is None else (len(rows.logits_rows), len(rows.slots))
            return out

        model.forward = forward


def run_case(
    engine: Any, meter: Meter, bare: BareModel, prompt: int, policy: str, steps: int, tick: Any, requests: int = 1
) -> Row:
    """Alternate engine steps and bare passes; steps before all requests have had their first two are left out."""
    from vllm import SamplingParams

    generator = torch.Generator().manual_seed(prompt)
    params = SamplingParams(
        temperature=0,
        max_tokens=CANVAS,
        ignore_eos=True,
        detokenize=False,
        extra_args={"d2cache_policy": policy},
    )
    names = [f"{policy}-{prompt}-{number}-{time.monotonic_ns()}" for number in range(requests)]
    for name in names:
        ids = torch.randint(0, bare.shape.vocab - 8, (prompt,), generator=generator).tolist()
        engine.add_request(name, {"prompt_token_ids": ids}, params)
    length, together = prompt + CANVAS, 0
    while together < 2:
        if not engine.has_unfinished_requests():
            raise RuntimeError(f"{requests} requests of {length} positions never had a step together")
        engine.step()
        together += meter.requests == requests

    def bare_pass(maps: bool) -> float:
        """Milliseconds of a pass of as many rows, each request's share by itself."""
        share, predicted = round(meter.rows / requests), round(meter.logits_rows / requests)
        positions = torch.randperm(length, generator=generator)[:share].sort().values
        tokens = torch.randint(0, bare.shape.vocab, (share,), generator=generator)
        start = time.perf_counter()
        for _ in range(requests):
            bare.forward(tokens, positions, length, torch.arange(predicted), maps=maps)
        return (time.perf_counter() - start) * 1e3

    step_ms, forward_ms, bare_ms, rows = [], [], [], []
    map_ms = [0.0]
    for _ in range(steps):
        meter.forward_s = 0.0
        start = time.perf_counter()
        engine.step()
        elapsed = (time.perf_counter() - start) * 1e3
        step_ms.append(elapsed)
        forward_ms.append(meter.forward_s * 1e3)
        rows.append(meter.rows)
        bare_ms.append(bare_pass(False))
        if policy != "full":
            map_ms.append(bare_pass(True))
        tick()
    engine.abort_request(names)
    while engine.has_unfinished_requests():
        engine.step()
    median = statistics.median
    outside = median(s - f for s, f in zip(step_ms, forward_ms, strict=True))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    step, passed = median(step_ms), median(bare_ms)
    ratio = median(s / b for s, b in zip(step_ms, bare_ms, strict=True))
    means = (statistics.mean(rows), length, step, median(forward_ms), outside, passed, ratio)
    return Row(prompt, policy, *means, median(map_ms[1:] or map_ms), peak, requests)


def report(rows: list[Row], console: Console) -> None:
    """Print the table."""
    table = Table(title=f"Canvas {CANVAS}, one token a step, fp32, {torch.get_num_threads()} threads")
    for name in ("prompt", "requests", "policy", "rows/step", "keys", "step ms", "forward ms", "outside ms", "bare ms"):
        table.add_column(name, justify="right")
    for name in ("step/bare", "bare+map ms", "step/(bare+map)", "speed-up", "bare speed-up", "peak MB"):
        table.add_column(name, justify="right")
    for r in rows:
        cells = [
            str(r.prompt),
            str(r.requests),
            r.policy,
            f"{r.rows:.0f}",
            str(r.keys),
            f"{r.step_ms:.1f}",
            f"{r.forward_ms:.1f}",
        ]
        cells += [f"{r.outside_ms:.1f}", f"{r.bare_ms:.1f}", f"{r.ratio_to_bare:.2f}"]
        with_map = (f"{r.bare_map_ms:.1f}", f"{r.step_ms / r.bare_map_ms:.2f}") if r.bare_map_ms else ("", "")
        cells += [*with_map, f"{r.speedup:.2f}"]
        table.add_row(*cells, f"{r.bare_speedup:.2f}", f"{r.peak_rss_mb:.0f}")
    console.print(table)


def plot(rows: list[Row], path: Path) -> None:
    """Bars of step and bare times."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    labels = [f"{r.policy}\nprompt {r.prompt}\n{r.requests} request{'s' * (r.requests > 1)}" for r in rows]
    figure, axes = plt.subplots(figsize=(1.5 * len(rows) + 1, 4))
    index = range(len(rows))
    axes.bar([i - 0.2 for i in index], [r.step_ms for r in rows], 0.4, label="engine step")
    axes.bar([i + 0.2 for i in index], [r.bare_ms for r in rows], 0.4, label="bare forward pass")
    axes.set_xticks(list(index), labels, fontsize=8)
    axes.set_yscale("log")
    axes.set_ylabel("milliseconds")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Run the cases and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, nargs="+", default=[512, 1024, 4032])
    parser.add_argument(
        "--requests", type=int, nargs="+", default=[8, 32], help="then so many, at the first prompt length"
    )
    parser.add_argument("--steps", type=int, default=16, help="d2cache steps timed for each prompt length")
    parser.add_argument("--full-steps", type=int, default=4, help="full steps timed for each prompt length")
    parser.add_argument("--out", type=Path, default=RESULTS / "cpu_step_speed.json")
    args = parser.parse_args()

    from vllm import LLM

    shape, console = Shape(), Console(width=170)
    with tempfile.TemporaryDirectory() as directory:
        write_checkpoint(Path(directory), shape)
        most = max(4, *args.requests)
        # All of them run together: a request waits until the rows of every later step fit.
        tokens = max(8192, most * (args.prompts[0] + CANVAS))
        settings = {"max_num_seqs": most, "max_num_batched_tokens": tokens}
        with console.status("starting the engine"):
            llm = LLM(directory, dtype="float32", skip_tokenizer_init=True, **settings)
    engine, bare = llm.llm_engine, BareModel(shape, 4096)
    meter = Meter(engine)
    rows: list[Row] = []
    with Progress(console=console, transient=True) as progress:
        cases = [(prompt, 1) for prompt in args.prompts] + [(args.prompts[0], number) for number in args.requests]
        counts = {"full": args.full_steps, "d2cache": args.steps}
        # Steps of many requests take long.
        timed = [{name: max(3, count // number) for name, count in counts.items()} for _, number in cases]
        task = progress.add_task("steps", total=sum(sum(steps.values()) for steps in timed))
        for (prompt, number), all_steps in zip(cases, timed, strict=True):
            pair = [
                run_case(engine, meter, bare, prompt, policy, steps, lambda: progress.advance(task), number)
                for policy, steps in all_steps.items()
            ]
            pair[1].speedup = pair[0].step_ms / pair[1].step_ms
            pair[1].bare_speedup = pair[0].bare_ms / pair[1].bare_ms
            rows += pair
    facts = machine()
    report(rows, console)
    console.print(caption(facts))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({"machine": facts, "rows": [asdict(r) for r in rows]}, indent=1) + "\n")
    plot(rows, args.out.with_suffix(".png"))
    console.print(f"written to {args.out} and {args.out.with_suffix('.png')}")


if __name__ == "__main__":
    main()
