"""Whole steps of the engine with random 8B weights: time against the floor of reading the weights once."""

from __future__ import annotations

import json
import os
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

from benchmarks.gpu.timing import Ceilings

CANVAS = 256

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


@dataclass
class Step:
    """One line of the table; times are medians in milliseconds."""

    family: str
    backend: str
    policy: str
    requests: int  # sent
    running: int  # admitted: the token budget of a step limits full recompute
    length: int
    rows: float  # of the whole batch
    step_ms: float
    forward_ms: float
    floor_ms: float
    peak_gb: float

    @property
    def ratio(self) -> float:
        """1 is the limit of the card."""
        return self.step_ms / self.floor_ms

    @property
    def outside(self) -> float:
        """Share of a step in which the GPU is not in the forward pass."""
        return 1 - self.forward_ms / self.step_ms

    @property
    def tokens_per_s(self) -> float:
        """One token a step and request."""
        return 1e3 * self.running / self.step_ms


class Engine:
    """One model with random weights, in this process."""

    def __init__(self, family: str, backend: str, directory: Path, max_len: int, max_seqs: int) -> None:
        from vllm import LLM

        (directory / "config.json").write_text(json.dumps(CONFIGS[family]))
        (directory / "generation_config.json").write_text("{}")
        self.family, self.backend = family, backend
        self.llm = LLM(
            str(directory),
            load_format="dummy",
            dtype="bfloat16",
            skip_tokenizer_init=True,
            max_model_len=max_len,
            max_num_seqs=max_seqs,
            # Queries of first steps are not in vLLM's memory profile yet.
            max_num_batched_tokens=16_384,
            gpu_memory_utilization=0.8,
            additional_config={"d2cache": {"attention_backend": backend}},
        )
        self.engine = self.llm.llm_engine
        worker = self.engine.engine_core.engine_core.model_executor.driver_worker.worker
        model, state = worker.model_runner.model, worker.model_runner.model_state
        self.weight_bytes = sum(p.nbytes for p in model.parameters())
        self.num_weights = sum(p.numel() for p in model.parameters())
        self.rows = self.running = 0
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        stock = model.forward

        def forward(*args: Any, **kwargs: Any) -> torch.Tensor:
            self.rows = kwargs["input_ids"].shape[0]
            self.running = 0 if state.rows is None else len(state.rows.slots)
            self._events[0].record()
            out = stock(*args, **kwargs)
            self._events[1].record()
            return out

        model.forward = forward

    def measure(self, policy: str, requests: int, length: int, limits: Ceilings, steps: int = 20) -> Step:
        """Median step of ``requests`` requests of ``length`` positions; first steps are left out."""
        from vllm import SamplingParams

        torch.cuda.reset_peak_memory_stats()
        params = SamplingParams(
            temperature=0,
            max_tokens=CANVAS,
            ignore_eos=True,
            detokenize=False,
            extra_args={"d2cache_policy": policy},
        )
        names = [f"{policy}-{i}-{time.monotonic_ns()}" for i in range(requests)]
        generator = torch.Generator().manual_seed(length)
        for name in names:
            ids = torch.randint(0, 10_000, (length - CANVAS,), generator=generator).tolist()
            self.engine.add_request(name, {"prompt_token_ids": ids}, params)
        # Admission may be spread over several steps: wait until every request refreshes a part only.
        for _ in range(requests + 4):
            self.engine.step()
        step_ms, forward_ms, rows = [], [], []
        for _ in range(steps):
            torch.cuda.synchronize()
            start = time.perf_counter()
            self.engine.step()
            torch.cuda.synchronize()
            step_ms.append(1e3 * (time.perf_counter() - start))
            forward_ms.append(self._events[0].elapsed_time(self._events[1]))
            rows.append(self.rows)
        running = self.running
        self.engine.abort_request(names)
        while self.engine.has_unfinished_requests():
            self.engine.step()
        mean_rows = statistics.mean(rows)
        return Step(
            self.family,
            self.backend,
            policy,
            requests,
            running,
            length,
            mean_rows,
            statistics.median(step_ms),
            statistics.median(forward_ms),
            limits.floor_ms(self.weight_bytes, 2 * self.num_weights * mean_rows),
            torch.cuda.max_memory_allocated() / 1e9,
        )


def served(family: str) -> bool:
    """Whether this version of the plugin knows the family."""
    from vllm import ModelRegistry

    from vllm_d2cache import register

    register()
    return CONFIGS[family]["architectures"][0] in ModelRegistry.get_supported_archs()
