"""Whole steps of the engine with random weights of real shapes: time against the floor of reading the weights once."""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

from benchmarks.gpu.timing import Ceilings, Stopwatch, synchronize

LLADA = {
    "architectures": ["LLaDAModelLM"],
    "model_type": "llada",
    "d_model": 4096,
    "n_heads": 32,
    "n_kv_heads": 32,
    "n_layers": 32,
    "mlp_hidden_size": 12288,
    "vocab_size": 126464,
    "embedding_size": 126464,
    "max_sequence_length": 4096,
    "mask_token_id": 126336,
    "eos_token_id": 126081,
    "torch_dtype": "bfloat16",
}
DREAM = {
    "architectures": ["DreamModel"],
    "model_type": "Dream",
    "hidden_size": 3584,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "intermediate_size": 18944,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "max_position_embeddings": 131072,
    "vocab_size": 152064,
    "tie_word_embeddings": False,
    "mask_token_id": 151666,
    "pad_token_id": 151643,
    "eos_token_id": 151643,
    "torch_dtype": "bfloat16",
}
CONFIGS = {"LLaDA-8B": LLADA, "Dream-7B": DREAM}
# For --dry-run: the same families, as small as they get.
TINY = {
    "LLaDA-8B": {
        **LLADA,
        **{"d_model": 64, "n_heads": 4, "n_kv_heads": 4, "n_layers": 2, "mlp_hidden_size": 128},
        **{"vocab_size": 512, "embedding_size": 512, "mask_token_id": 510, "eos_token_id": 509},
    }
}
_STEPS_TO_ADMIT = 200


@dataclass(frozen=True)
class Case:
    """What is asked of the engine at one time."""

    policy: str
    workload: str
    prompts: list[int]  # tokens of each request's prompt
    canvas: int


@dataclass
class Step:
    """One line of the table; times are medians in milliseconds."""

    family: str
    backend: str
    execution: str  # eager or graphs
    policy: str
    workload: str
    requests: int  # sent
    running: int  # admitted: tokens and memory of a step limit full recompute
    length: int  # of the longest
    rows: float  # of the whole batch
    step_ms: float
    forward_ms: float
    floor_ms: float
    peak_gb: float  # of the device, everything included

    @property
    def ratio(self) -> float:
        """1 is the limit of the card."""
        return self.step_ms / self.floor_ms

    @property
    def outside(self) -> float:
        """Share of a step in which the device is not in the forward pass."""
        return 1 - self.forward_ms / self.step_ms

    @property
    def tokens_per_s(self) -> float:
        """One token a step and request; a request's latency per token is the step itself."""
        return 1e3 * self.running / self.step_ms


def start(
    config: dict[str, Any], directory: Path, backend: str | None, eager: bool, max_len: int, max_seqs: int, dtype: str
) -> Any:
    """vLLM on a checkpoint of random weights, in this process."""
    from vllm import LLM

    (directory / "config.json").write_text(json.dumps(config))
    (directory / "generation_config.json").write_text("{}")
    return LLM(
        str(directory),
        load_format="dummy",
        dtype=dtype,
        skip_tokenizer_init=True,
        max_model_len=max_len,
        max_num_seqs=max_seqs,
        enforce_eager=eager,
        additional_config={"d2cache": {} if backend is None else {"attention_backend": backend}},
    )


class Engine:
    """Drives an in-process vLLM step by step."""

    def __init__(self, family: str, backend: str, llm: Any) -> None:
        self.family, self.backend = family, backend
        self.engine = llm.llm_engine
        self.execution = "eager" if self.engine.vllm_config.model_config.enforce_eager else "graphs"
        runner = self.engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
        self.model, self.state, self.device = runner.model, runner.model_state, runner.device
        self._graphs = getattr(runner, "cudagraph_manager", None)
        parameters = list(self.model.parameters())
        self.weight_bytes = sum(p.nbytes for p in parameters)
        self.num_weights = sum(p.numel() for p in parameters)

    def measure(self, case: Case, limits: Ceilings, steps: int = 20) -> Step:
        """Median step once every request that fits has been admitted; first steps are left out."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        step_ms, forward_ms, rows, running = [], [], [], []
        with self._running(case), self._watched() as watched:
            for _ in range(steps):
                synchronize(self.device)
                begin = time.perf_counter()
                self.engine.step()
                synchronize(self.device)
                step_ms.append(1e3 * (time.perf_counter() - begin))
                forward_ms.append(watched.stopwatch.ms())
                rows.append(watched.rows)
                running.append(watched.running)
        mean_rows = statistics.mean(rows)
        return Step(
            self.family,
            self.backend,
            self.execution,
            case.policy,
            case.workload,
            len(case.prompts),
            max(running),
            max(case.prompts) + case.canvas,
            mean_rows,
            statistics.median(step_ms),
            statistics.median(forward_ms),
            limits.floor_ms(self.weight_bytes, 2 * self.num_weights * mean_rows),
            torch.cuda.max_memory_allocated() / 1e9 if self.device.type == "cuda" else 0.0,
        )

    def profile(self, case: Case, steps: int = 3) -> str:
        """torch.profiler's table of some steps."""
        from torch.profiler import ProfilerActivity, profile

        cuda = self.device.type == "cuda"
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
        with self._running(case):
            self.engine.step()
            with profile(activities=activities) as recorded:
                for _ in range(steps):
                    self.engine.step()
                synchronize(self.device)
        order = "self_cuda_time_total" if cuda else "self_cpu_time_total"
        return recorded.key_averages().table(sort_by=order, row_limit=25, max_name_column_width=60)

    @contextmanager
    def _running(self, case: Case) -> Iterator[None]:
        """The requests of ``case``, past their first steps; gone afterwards."""
        from vllm import SamplingParams

        params = SamplingParams(
            temperature=0,
            max_tokens=case.canvas,
            ignore_eos=True,
            detokenize=False,
            extra_args={"d2cache_policy": case.policy},
        )
        names = [f"{case.policy}-{i}-{time.monotonic_ns()}" for i in range(len(case.prompts))]
        generator = torch.Generator().manual_seed(0)
        for name, length in zip(names, case.prompts, strict=True):
            ids = torch.randint(0, 256, (length,), generator=generator).tolist()
            self.engine.add_request(name, {"prompt_token_ids": ids}, params)
        running = -1
        with self._watched() as watched:
            # Admission is spread over steps; over when a step has admitted nobody, and no first step is under way.
            for _ in range(_STEPS_TO_ADMIT):
                self.engine.step()
                if watched.running == running:
                    break
                running = watched.running
        self.engine.step()
        try:
            yield
        finally:
            self.engine.abort_request(names)
            while self.engine.has_unfinished_requests():
                self.engine.step()

    @contextmanager
    def _watched(self) -> Iterator[_Watched]:
        """Rows, requests and time of each forward pass, be it a call of the model or the replay of a graph."""
        watched = _Watched(Stopwatch(self.device))
        places = [(self.model, "forward"), (self._graphs, "run_fullgraph")]
        places = [(owner, name) for owner, name in places if hasattr(owner, name)]

        def watch(stock: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                step = self.state.step
                watched.rows = 0 if step is None else sum(step.rows.counts) + sum(step.rows.extra)
                watched.running = 0 if step is None else len(step.rows.slots)
                with watched.stopwatch:
                    return stock(*args, **kwargs)

            return call

        for owner, name in places:
            setattr(owner, name, watch(getattr(owner, name)))
        try:
            yield watched
        finally:
            for owner, name in places:
                delattr(owner, name)


@dataclass
class _Watched:
    """Of the last forward pass."""

    stopwatch: Stopwatch
    rows: int = 0
    running: int = 0


def served(family: str) -> bool:
    """Whether this version of the plugin knows the family."""
    from vllm import ModelRegistry

    from vllm_d2cache import register

    register()
    return CONFIGS[family]["architectures"][0] in ModelRegistry.get_supported_archs()


def prompt_lengths() -> dict[str, list[int]]:
    """Token counts of real prompts, by workload (tools/prompt_lengths.py)."""
    return json.loads((Path(__file__).parent / "data" / "prompt_lengths.json").read_text())


def cases(
    policies: list[str], lengths: list[int], concurrency: list[int], workloads: list[str], canvases: list[int]
) -> list[Case]:
    """Batch 1 at each length, then each number of requests with the first prompts of each workload."""
    prompts = prompt_lengths()
    found = [Case(p, f"T={t}", [t - canvases[0]], canvases[0]) for p in policies for t in lengths]
    found += [
        Case(policy, f"{workload}+{canvas}", (prompts[workload] * n)[:n], canvas)
        for workload in workloads
        for canvas in canvases
        for policy in policies
        for n in concurrency
    ]
    return found


def close(llm: Any) -> None:
    """Make room for the next engine of this process."""
    import gc

    from vllm.distributed import cleanup_dist_env_and_memory

    llm.llm_engine.engine_core.shutdown()
    gc.collect()
    cleanup_dist_env_and_memory()
