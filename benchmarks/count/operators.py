"""What the host does in a step outside the forward pass, beside a stock autoregressive model in the same engine.

    python -m benchmarks.count.operators [--out benchmarks/results/operators]

Two engines of this process, in turn, four times, with the same number of running requests: the small LLaDA of this
repository, and a small Llama of vLLM's with weights of chance. Counted are PyTorch's operators (views included) that a
step dispatches between its start and its end, but for those of the model's forward pass; then, in other steps, the time
on the clock, less that of the forward pass and, in a column of its own, of the LM head, which is the network as well: a
step predicts every mask of a window, a stock one a row a request. Steps are those in which every request decodes. Of
their operators the median counts; of their times the lower quartile, as other work on the machine can only add to
them, and does so for seconds on end.
What of that time passes in this plugin's own code is told apart: in what vLLM's runner calls of the model's state and
in the sampler. The rest is vLLM's engine, scheduler and runner, which is another runner (V2) than that of a stock model
on a CPU.
`d2cache` pushes its weights through the attention maps behind the forward pass; `prefix` needs no maps. A pass of many
rows leaves time for others to empty the processor's caches, and the host's code behind it takes longer, whatever it
does: so a line of the stock model has its network run as often in each step as makes the pass as long as d2cache's.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.machine import caption, machine
from vllm_d2cache.compat.internals import in_process_runner

MODEL = Path("models/tiny-llada")
LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 192, "intermediate_size": 512,
    "num_hidden_layers": 4, "num_attention_heads": 6, "num_key_value_heads": 6, "vocab_size": 320, "hidden_act": "silu",
    "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "max_position_embeddings": 4096, "tie_word_embeddings": False,
    "torch_dtype": "float32", "bos_token_id": 314, "eos_token_id": 315,
}  # fmt: skip
PROMPT, CANVAS, STEPS, TIMED, ROUNDS = 40, 64, 12, 24, 4
# Requests, and how often they are denoised in a round: short steps more often, as other work may disturb a stretch.
BATCHES = {1: 12, 8: 4, 64: 1}
STOCK, LONG = "stock Llama", "stock Llama, long pass"
POLICIES = ("prefix", "d2cache")


Times = list[tuple[float, float, float, float]]
"""Milliseconds of steps outside the network, those of them in the plugin, of forward passes and of LM heads."""
HOOKS = ("preprocess_state", "prepare_attn", "prepare_inputs")  # of the model's state, that vLLM's runner calls


@dataclass
class Line:
    """Of the steps of a batch: operators, and milliseconds as in Times."""

    name: str  # STOCK, LONG or a policy
    batch: int
    operators: float
    outside: float
    plugin: float
    forward: float
    head: float


class Watched:
    """An engine whose forward pass is left out of what is counted and of what is timed."""

    def __init__(self, model: str, batch: int, load_format: str) -> None:
        from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
        from vllm import LLM

        self.llm = LLM(
            model, dtype="float32", max_num_seqs=batch, load_format=load_format, max_model_len=256, seed=0,
            enforce_eager=True, num_gpu_blocks_override=4 * batch + 16,  # not all of it is freed with the engine
        )  # fmt: skip
        self.batch, self.found, self.passes = batch, Counter[str](), 1
        self.seconds = {"forward": 0.0, "head": 0.0, "plugin": 0.0}
        watched = self

        class Mode(TorchDispatchMode):
            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                watched.found[str(func)] += 1
                return func(*args, **(kwargs or {}))

        self.mode = Mode
        runner = in_process_runner(self.llm)
        model_of, state = runner.model, getattr(runner, "model_state", None)
        model_of.forward = self._timed("forward", model_of.forward, _disable_current_modes)
        head = model_of.logits_processor
        head.forward = self._timed("head", head.forward, nullcontext)
        if state is not None:
            for name in HOOKS:
                setattr(state, name, self._timed("plugin", getattr(state, name), nullcontext))
            sampler = type(runner.sampler)  # a call of an object looks its class up
            call = {"__call__": self._timed("plugin", sampler.__call__, nullcontext)}
            runner.sampler.__class__ = type(sampler.__name__, (sampler,), call)

    def _timed(
        self, part: str, work: Callable[..., Any], around: Callable[[], AbstractContextManager[Any]]
    ) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter()
            with around():
                for _ in range(self.passes if part == "forward" else 1):
                    found = work(*args, **kwargs)
            self.seconds[part] += time.perf_counter() - begin
            return found

        return run

    @contextmanager
    def running(self, policy: str) -> Iterator[Any]:
        """Every request of the batch has had its first step; what is left ends afterwards."""
        from vllm import SamplingParams

        engine = self.llm.llm_engine
        extra = {"d2cache_policy": policy} if policy in POLICIES else {}
        params = SamplingParams(temperature=0, max_tokens=CANVAS, ignore_eos=True, extra_args=extra)
        for number in range(self.batch):
            tokens = [(7 * number + place) % 250 for place in range(PROMPT)]
            engine.add_request(str(number), {"prompt_token_ids": tokens}, params)
        for _ in range(4):
            engine.step()
        yield engine
        while engine.has_unfinished_requests():
            engine.step()

    def measure(self, name: str) -> tuple[float, Times]:
        """Operators of a step, the median of STEPS; then the times of TIMED more."""
        operators, times = [], []
        with self.running(name) as engine:
            for _ in range(STEPS):
                self.found.clear()
                with self.mode():
                    engine.step()
                operators.append(sum(self.found.values()))
            for _ in range(TIMED):
                self.seconds = dict.fromkeys(self.seconds, 0.0)
                begin = time.perf_counter()
                engine.step()
                whole = time.perf_counter() - begin
                forward, head = self.seconds["forward"], self.seconds["head"]
                plugin = max(0.0, self.seconds["plugin"] - head)  # which runs in the sampler
                times.append((1000 * (whole - forward - head), 1000 * plugin, 1000 * forward, 1000 * head))
        return statistics.median(operators), times


def lines() -> list[Line]:
    """Both models at every batch."""
    from vllm.distributed import cleanup_dist_env_and_memory

    found = []
    with tempfile.TemporaryDirectory(prefix="d2cache-llama-") as directory:
        for path in MODEL.glob("tokenizer*.json"):
            (Path(directory) / path.name).write_text(path.read_text())
        (Path(directory) / "config.json").write_text(json.dumps(LLAMA))
        engines = (POLICIES, str(MODEL), "auto"), ((STOCK, LONG), directory, "dummy")
        for batch, repeats in BATCHES.items():
            operators: dict[str, float] = {}
            times: dict[str, Times] = {}
            for names, model, load in engines * ROUNDS:
                watched = Watched(model, batch, load)
                for name in names:
                    if name == LONG:
                        watched.passes = round(_forward(times[POLICIES[-1]]) / _forward(times[STOCK]))
                    watched.measure(name)  # a request's first use of anything is not a step's
                    for _ in range(repeats):
                        operators[name], seen = watched.measure(name)
                        times.setdefault(name, []).extend(seen)
                del watched
                gc.collect()
                cleanup_dist_env_and_memory()
            quick = {name: map(_lower_quartile, zip(*seen, strict=True)) for name, seen in times.items()}
            found += [Line(name, batch, operators[name], *quick[name]) for name in (STOCK, LONG, *POLICIES)]
    return found


def _forward(times: Times) -> float:
    """Milliseconds of a forward pass."""
    return _lower_quartile([forward for _, _, forward, _ in times])


def _lower_quartile(numbers: Sequence[float]) -> float:
    return statistics.quantiles(numbers, n=4)[0]


def table(found: list[Line]) -> str:
    """Markdown: what a step is, at every batch, and how much more that is than a stock step."""
    heads = (
        "requests",
        "step",
        "operators",
        "of stock",
        "ms outside the network",
        "of stock",
        "of a long pass",
        "ms of it in the plugin",
        "ms forward",
        "ms LM head",
    )
    rows = []
    for x in found:
        stock, long = (next(y for y in found if y.batch == x.batch and y.name == name) for name in (STOCK, LONG))
        rows.append(
            f"| {x.batch} | {x.name} | {x.operators:.0f} | {x.operators / stock.operators:.1f} | {x.outside:.2f} | "
            f"{x.outside / stock.outside:.1f} | {x.outside / long.outside:.1f} | {x.plugin:.2f} | {x.forward:.2f} | "
            f"{x.head:.2f} |"
        )
    return "\n".join(["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|", *rows])


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/operators"))
    args = parser.parse_args()
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    found, facts = lines(), machine()
    text = f"{table(found)}\n\n{PROMPT} + {CANVAS} positions, greedy; {caption(facts)}\n"
    print(text)
    args.out.with_suffix(".md").write_text(text)
    args.out.with_suffix(".json").write_text(
        json.dumps({"machine": facts, "lines": [asdict(x) for x in found]}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
