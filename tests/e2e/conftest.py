"""Engines shared by the tests of this folder: starting one takes up to a minute."""

from __future__ import annotations

import gc
import json
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.e2e.server import Server, serve
from tests.reference.oracle import ORACLE, SERVER, case_names, load_case

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


class Engine:
    """An in-process engine on the tiny random checkpoint of the traces, driven with token ids."""

    def __init__(self, trace_dir: Path, **settings: Any) -> None:
        from vllm import LLM

        additional = {"d2cache": {"trace_dir": str(trace_dir), **SERVER}}
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
        return [(list(o.outputs[0].token_ids), self.trace(o.request_id)) for o in self._generate(requests)]

    def tokens(self, requests: list[dict[str, Any]]) -> list[list[int]]:
        """Output tokens alone, of an engine that may be without traces."""
        return [list(o.outputs[0].token_ids) for o in self._generate(requests)]

    def _generate(self, requests: list[dict[str, Any]]) -> list[Any]:
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
        return self.llm.generate(prompts, params, use_tqdm=False)

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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """One process holds one engine at a time: first the tests that share one, then the server's, then all others.

    With several processes (``--dist loadgroup``) what shares something stays in one of them, and so does a file.
    """
    order = ("", "engine", "server")

    def group(item: pytest.Item) -> str:
        if Path(__file__).parent not in item.path.parents:
            return ""
        names = getattr(item, "fixturenames", ())
        return next((name for name in order[1:] if name in names), item.path.name)

    for item in items:
        if name := group(item):
            item.add_marker(pytest.mark.xdist_group(name))
    items.sort(key=lambda item: order.index(name) if (name := group(item)) in order else len(order))


def runner_of(engine: Engine) -> Any:
    """vLLM's model runner inside the in-process engine."""
    return engine.llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """`vllm serve models/tiny-llada`, no other flag; shared by all tests that talk to a server."""
    with serve(tmp_path_factory.mktemp("server") / "log") as running:
        yield running


@pytest.fixture(scope="session")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """The engine as a user gets it, but for fp32 and eight places. test_variants.py, the last to use it, closes it."""
    made = Engine(tmp_path_factory.mktemp("traces"))
    yield made
    made.close()


OPTIONS: list[dict[str, Any]] = [
    {},
    {"policy": "full"},
    {"policy": "d2cache_light"},
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
    {"policy": "spa", "refresh_steps": 9, "refresh_gen_steps": 4, "max_update_ratio": 0.5, "proxy_rank": 8},
    {"policy": "entropy", "entropy_tau": 3.0, "entropy_k": 3, "score": "entropy"},
    {"policy": "es", "window": 12, "prompt_update_freq": 9, "block_update_freq": 4, "tokens_per_step": 2},
    {"policy": "elastic", "elastic_beta": 5, "elastic_gamma": 0.995},
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
    """The trace without its request id, and without what need not repeat to the last digit: confidences and times."""
    return [{k: v for k, v in line.items() if k not in ("confidence", "elapsed")} for line in trace[1:]]


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


def assert_traces(engine: Engine, family: str) -> None:
    """The published implementation's traces, step by step."""
    cases = [load_case(name) for name in case_names(family)]
    requests = [{"prompt": c.prompt, "max_tokens": c.canvas_length, "options": c.options} for c in cases]
    for case, (tokens, trace) in zip(cases, engine.run(requests), strict=True):
        steps = [(line["refreshed"], [tuple(pair) for pair in line["committed"]]) for line in trace[1:-1]]
        for number, (got, want) in enumerate(zip(steps, case.steps, strict=True)):
            assert got == want, f"{case.name}, step {number}"
        assert tokens == case.final_tokens, case.name
        assert trace[-1] == {"output_token_ids": tokens, "finish_reason": "length"}


def assert_golden_logits(engine: Engine, family: str, row: int) -> None:
    """The published model's logits of every position, prompt and canvas."""
    golden = np.load(ORACLE / "traces" / f"golden_{family}.npz")
    padding = int((golden["attention_mask"][row] == 0).sum())
    ids = golden["input_ids"][row, padding:].tolist()
    canvas = ids.index(370)  # the traces' mask token: the rest of the row is canvas
    model, hidden = runner_of(engine).model, []
    stock = model.forward

    def forward(*args: Any, **kwargs: Any) -> torch.Tensor:
        hidden.append(stock(*args, **kwargs))
        return hidden[-1]

    model.forward = forward
    try:
        engine.run([{"prompt": ids[:canvas], "max_tokens": len(ids) - canvas}])
    finally:
        model.forward = stock
    with torch.inference_mode():
        logits = model.lm_logits(hidden[0]).cpu()
    want = torch.from_numpy(golden["logits_masked_batch"][row, padding:])
    torch.testing.assert_close(logits, want, rtol=0, atol=1e-4)
