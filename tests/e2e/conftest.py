"""Engines shared by the tests of this folder: starting one takes up to a minute."""

from __future__ import annotations

import gc
import json
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.reference.oracle import ORACLE

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


class Engine:
    """An in-process engine on the tiny random checkpoint of the traces, driven with token ids."""

    def __init__(self, trace_dir: Path, **settings: Any) -> None:
        from vllm import LLM

        additional = {"d2cache": {"trace_dir": str(trace_dir)}}
        defaults: dict[str, Any] = {
            "model": str(ORACLE / "llada"),
            "dtype": "float32",
            "skip_tokenizer_init": True,
            "max_num_seqs": 8,
            "additional_config": additional,
        }
        self.trace_dir = trace_dir
        self.llm = LLM(**{**defaults, **settings})

    def run(self, requests: list[dict[str, Any]]) -> list[tuple[list[int], list[dict[str, Any]]]]:
        """Output tokens and trace lines of each request, all submitted at once.

        A request has prompt, max_tokens, optional sampling fields, and ``options`` by plain option name.
        """
        from vllm import SamplingParams

        prompts = [{"prompt_token_ids": r["prompt"]} for r in requests]
        params = [
            SamplingParams(
                **{"temperature": 0.0, "ignore_eos": True, **r.get("sampling", {})},
                max_tokens=r["max_tokens"],
                detokenize=False,
                extra_args={f"d2cache_{k}": v for k, v in r.get("options", {}).items()},
            )
            for r in requests
        ]
        outputs = self.llm.generate(prompts, params, use_tqdm=False)
        return [(list(o.outputs[0].token_ids), self.trace(o.request_id)) for o in outputs]

    def trace(self, request_id: str) -> list[dict[str, Any]]:
        """The lines of a request's trace."""
        # The engine appends a random part to the id that the caller sees.
        (path,) = self.trace_dir.glob(f"{request_id}-*.jsonl")
        return [json.loads(line) for line in path.read_text().splitlines()]

    def close(self) -> None:
        """Free the engine so that the next one can start in this process."""
        from vllm.distributed import cleanup_dist_env_and_memory

        if not hasattr(self, "llm"):
            return
        self.llm.llm_engine.engine_core.shutdown()
        del self.llm
        gc.collect()
        cleanup_dist_env_and_memory()


@pytest.fixture(scope="session")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """The engine as a user gets it, but for fp32 and eight places. test_variants.py, which runs last, closes it."""
    made = Engine(tmp_path_factory.mktemp("traces"))
    yield made
    made.close()


OPTIONS: list[dict[str, Any]] = [
    {},
    {"policy": "full"},
    {"threshold": 0.3},
    {"policy": "full", "factor": 1.0, "window": 8},
    {"confidence_memory": "latest", "current_k": 4},
    {"window": 7, "tokens_per_step": 3, "score": "margin"},
    {"score": "entropy", "rollout_p": 0.5, "inflate_w": 3},
    {"sigma": 0, "current_k": 8, "rollout_p": 0.02, "confidence_top_p": 0.9},
    {"policy": "prefix", "window": 7},
    {"policy": "dual", "window": 8, "threshold": 0.2},
    {"policy": "dkv", "window": 8, "cache_steps": 3},
    {"policy": "dkv", "dkv_variant": "pd", "cache_steps": 4, "tokens_per_step": 2},
    {"policy": "vicinity", "window": 8, "prefix_look": 3, "after_look": 5, "warmup_steps": 1},
    {"policy": "window_diffusion", "outer_window": 9, "inner_window": 4, "phase_steps": 5},
    {"policy": "streaming", "window": 8, "suffix_window": 6, "tokens_per_step": 2},
    {"policy": "sparse_dllm", "window": 8, "keep_ratio": 0.3},
    {"policy": "dllm_cache", "kp": 7, "kr": 3, "rou": 0.3, "window": 8},
    {"policy": "entropy", "entropy_tau": 3.0, "entropy_k": 3, "score": "entropy"},
]


def mixed_requests(count: int, seed: int) -> list[dict[str, Any]]:
    """Requests of many prompt and canvas lengths, policies and sampling settings."""
    rng = random.Random(seed)
    requests = []
    for i in range(count):
        prompt = [rng.randrange(360) for _ in range(rng.choice([1, 2, 13, 64, 127, 128, 200]))]
        sampling = {"temperature": 0.8, "seed": i, "top_p": 0.9, "top_k": 50} if i % 3 == 2 else {}
        requests.append(
            {
                "prompt": prompt,
                "max_tokens": rng.choice([1, 5, 16, 24, 40]),
                "options": OPTIONS[i % len(OPTIONS)],
                "sampling": sampling,
            }
        )
    return requests


def steps_of(trace: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The trace without its request id."""
    return trace[1:]


@pytest.fixture(scope="session")
def requests() -> list[dict[str, Any]]:
    return mixed_requests(16, seed=0)


@pytest.fixture(scope="session")
def alone(engine: Engine, requests: list[dict[str, Any]]) -> list[tuple[list[int], list[dict[str, Any]]]]:
    """What each request gives with the engine to itself."""
    return [engine.run([r])[0] for r in requests]


def assert_same(got: list[Any], want: list[Any]) -> None:
    for i, ((tokens, trace), (tokens_alone, trace_alone)) in enumerate(zip(got, want, strict=True)):
        assert tokens == tokens_alone, f"request {i}"
        assert steps_of(trace) == steps_of(trace_alone), f"request {i}"
