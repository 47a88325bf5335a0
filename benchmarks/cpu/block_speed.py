"""Block-diffusion steps on CPU: a step against a bare forward pass, and prompts with and without the prefix cache.

Without ``--model``: random weights of SDAR's architecture, fp32, one request; engine steps and bare forward passes of
the same numbers of rows and keys alternate in one process, so that what disturbs one disturbs the other. With it: any
checkpoint of a block-diffusion family, without the bare passes. Run as ``python -m benchmarks.cpu.block_speed``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.cpu.step_speed import RESULTS, Meter  # sets the environment before torch is there

import torch  # isort: skip
from rich.console import Console  # isort: skip
from rich.table import Table  # isort: skip

from benchmarks.cpu.bare import BareModel, Shape
from benchmarks.machine import caption, machine

BLOCKS = (4, 32)
POLICIES = ("block", "d2cache")
_FILES = {"q_proj": 0, "k_proj": 1, "v_proj": 2}


@dataclass
class Row:
    """One line of the table; times are medians in milliseconds."""

    block: int
    prompt: int
    policy: str
    tokens_per_forward: float
    rows_per_token: float  # of steps after the prompt's
    step_ms: float
    bare_ms: float  # 0 where there is none
    ratio_to_bare: float  # the median of the ratios of pairs
    cold_ms: float  # to the end of the prompt's step, nothing stored
    warm_ms: float  # the same prompt again
    cold_rows: int
    warm_rows: int


def write_checkpoint(directory: Path, shape: Shape, block: int) -> None:
    """An SDAR config and the weights of :class:`BareModel`."""
    from safetensors.torch import save_file

    head = shape.width // shape.heads
    config = {
        "architectures": ["SDARForCausalLM"],
        "model_type": "sdar",
        "hidden_size": shape.width,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.heads,
        "head_dim": head,
        "num_hidden_layers": shape.layers,
        "intermediate_size": shape.mlp,
        "vocab_size": shape.vocab,
        "max_position_embeddings": 4096,
        "rope_theta": 500000.0,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": False,
        "block_size": block,
        "mask_token_id": shape.vocab - 1,
        "eos_token_id": shape.vocab - 2,
        "torch_dtype": "float32",
    }
    (directory / "config.json").write_text(json.dumps(config))
    model = BareModel(shape, 1)
    tensors = {
        "model.embed_tokens.weight": model.embedding,
        "lm_head.weight": model.head,
        "model.norm.weight": model.norm,
    }
    for i, (qkv, out, up, down) in enumerate(model.blocks):
        b = f"model.layers.{i}."
        gate, up_proj = up.chunk(2)
        named = {f"self_attn.{name}": qkv.chunk(3)[part] for name, part in _FILES.items()}
        named |= {"self_attn.o_proj": out, "mlp.gate_proj": gate, "mlp.up_proj": up_proj, "mlp.down_proj": down}
        named |= {"self_attn.q_norm": torch.ones(head), "self_attn.k_norm": torch.ones(head)}
        named |= {"input_layernorm": model.norm, "post_attention_layernorm": model.norm}
        tensors |= {f"{b}{name}.weight": tensor.clone() for name, tensor in named.items()}
    save_file(tensors, str(directory / "model.safetensors"))


class Case:
    """A prompt of one engine."""

    def __init__(self, engine: Any, meter: Meter, vocab: int, prompt: int, max_tokens: int) -> None:
        generator = torch.Generator().manual_seed(prompt)
        self.engine, self.meter, self.vocab, self.max_tokens = engine, meter, vocab, max_tokens
        self.prompt = torch.randint(0, vocab - 8, (prompt,), generator=generator).tolist()
        self.counters = meter.runner.model_state.steps.counters

    def start(self, policy: str) -> tuple[float, int]:
        """Milliseconds and rows until the first step of a request is over, pieces of its prompt before it included."""
        from vllm import SamplingParams

        self.name = f"{policy}-{time.monotonic_ns()}"
        params = SamplingParams(
            temperature=0,
            max_tokens=self.max_tokens,
            ignore_eos=True,
            detokenize=False,
            extra_args={"d2cache_policy": policy, "d2cache_threshold": 0.0},
        )
        self.engine.add_request(self.name, {"prompt_token_ids": self.prompt}, params)
        self.counters.reset()
        start, rows = time.perf_counter(), 0
        while not self.counters.steps:
            self._step()
            rows += self.meter.rows
        return (time.perf_counter() - start) * 1e3, rows

    def _step(self) -> float:
        self.meter.rows = 0
        start = time.perf_counter()
        self.engine.step()
        return (time.perf_counter() - start) * 1e3

    def end(self) -> None:
        """Let it go."""
        self.engine.abort_request([self.name])
        while self.engine.has_unfinished_requests():
            self.engine.step()

    def steps(self, count: int, bare: BareModel | None) -> dict[str, float]:
        """Steps behind the first one, and bare passes between them."""
        counters = self.counters
        counters.reset()
        step_ms, bare_ms = [], []
        generator = torch.Generator().manual_seed(0)
        for _ in range(count):
            step_ms.append(self._step())
            if bare is None or not self.meter.rows:
                continue
            length = len(self.prompt) + counters.committed
            positions = torch.arange(max(0, length - self.meter.rows), length)
            tokens = torch.randint(0, self.vocab, (len(positions),), generator=generator)
            start = time.perf_counter()
            bare.forward(tokens, positions, length, torch.arange(self.meter.logits_rows))
            bare_ms.append((time.perf_counter() - start) * 1e3)
        tokens = max(1, counters.committed)
        median = statistics.median
        return {
            "tokens_per_forward": counters.committed / max(1, counters.forwards),
            "rows_per_token": counters.rows / tokens,
            "step_ms": median(step_ms),
            "bare_ms": median(bare_ms) if bare_ms else 0.0,
            "ratio_to_bare": median(s / b for s, b in zip(step_ms, bare_ms, strict=True)) if bare_ms else 0.0,
        }


def run_engine(model: str, bare: BareModel | None, prompts: list[int], steps: int) -> list[Row]:
    """The lines of one checkpoint."""
    from vllm import LLM

    llm = LLM(model, dtype="float32", skip_tokenizer_init=True, max_num_seqs=4, async_scheduling=False)
    engine, hf_config = llm.llm_engine, llm.llm_engine.model_config.hf_config
    block = hf_config.traits().block_length
    if block is None:
        raise SystemExit(f"--model {model}: must be of a block-diffusion family, got {hf_config.architectures}")
    meter, rows = Meter(engine), []
    for length in prompts:
        for policy in POLICIES:
            case = Case(engine, meter, hf_config.vocab_size, length, 4 * steps)
            case.start(policy)  # what the first use of a setting allocates
            case.end()
            times: dict[bool, list[tuple[float, int]]] = {False: [], True: []}
            for _ in range(3):
                engine.reset_prefix_cache()
                for warm in (False, True):
                    times[warm].append(case.start(policy))
                    case.end()
            case.start(policy)
            found = case.steps(steps, bare)
            case.end()
            cold, warm_ = (statistics.median(ms for ms, _ in times[w]) for w in (False, True))
            rows.append(
                Row(
                    block,
                    length,
                    policy,
                    **found,
                    cold_ms=cold,
                    warm_ms=warm_,
                    cold_rows=times[False][-1][1],
                    warm_rows=times[True][-1][1],
                )
            )
    return rows


def report(rows: list[Row], console: Console, title: str) -> None:
    """Print the table."""
    table = Table(title=title)
    heads = ("block", "prompt", "policy", "tokens/forward", "rows/token", "step ms", "bare ms", "step/bare")
    for name in (*heads, "cold ms", "warm ms", "warm/cold", "cold rows", "warm rows"):
        table.add_column(name, justify="right")
    for r in rows:
        bare = (f"{r.bare_ms:.1f}", f"{r.ratio_to_bare:.2f}") if r.bare_ms else ("", "")
        cells = [str(r.block), str(r.prompt), r.policy, f"{r.tokens_per_forward:.2f}", f"{r.rows_per_token:.1f}"]
        cells += [f"{r.step_ms:.1f}", *bare, f"{r.cold_ms:.1f}", f"{r.warm_ms:.1f}", f"{r.warm_ms / r.cold_ms:.2f}"]
        table.add_row(*cells, str(r.cold_rows), str(r.warm_rows))
    console.print(table)


def main() -> None:
    """Run the cases and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="a checkpoint of a block-diffusion family; without it: random weights")
    parser.add_argument("--block", type=int, choices=BLOCKS, help="of the random weights, positions; default: each")
    parser.add_argument("--prompts", type=int, nargs="+", default=[514, 1026])
    parser.add_argument("--steps", type=int, default=24, help="steps timed for each line")
    parser.add_argument("--out", type=Path, default=RESULTS / "cpu_block_speed.json")
    args = parser.parse_args()
    console, rows = Console(width=170), []
    if args.model:
        rows = run_engine(args.model, None, args.prompts, args.steps)
    elif args.block:
        with tempfile.TemporaryDirectory() as directory:
            write_checkpoint(Path(directory), Shape(), args.block)
            rows = run_engine(directory, BareModel(Shape(), 4096), args.prompts, args.steps)
    else:
        for block in BLOCKS:  # a process has one engine
            with tempfile.NamedTemporaryFile(suffix=".json") as file:
                command = [
                    sys.executable,
                    "-m",
                    "benchmarks.cpu.block_speed",
                    "--block",
                    str(block),
                    "--out",
                    file.name,
                ]
                command += ["--steps", str(args.steps), "--prompts", *map(str, args.prompts)]
                subprocess.run(command, check=True)
                rows += [Row(**row) for row in json.loads(Path(file.name).read_text())["rows"]]
    facts, model = machine(), args.model or "random weights of SDAR's architecture"
    report(rows, console, f"{model}: one request, one token a step at least, fp32, {torch.get_num_threads()} threads")
    console.print(caption(facts))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(
        json.dumps({"machine": facts, "model": model, "rows": [asdict(r) for r in rows]}, indent=1) + "\n"
    )
    console.print(f"written to {args.out}")


if __name__ == "__main__":
    main()
