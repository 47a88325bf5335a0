"""The ten lines of the start-up log, on numbers that can be worked out by hand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from vllm_d2cache.canvas.states import CanvasStates
from vllm_d2cache.canvas.traits import FamilyTraits
from vllm_d2cache.engine.memory_plan import state_bytes
from vllm_d2cache.engine.startup_log import plan_lines
from vllm_d2cache.models.shape import TransformerShape
from vllm_d2cache.requests.resolve import parse_server_options

LAYERS, KV_HEADS, HEAD, LENGTH, SLOTS, BLOCK = 4, 2, 32, 1024, 8, 16


SHAPE = TransformerShape(
    hidden_size=8 * HEAD,
    num_layers=LAYERS,
    num_heads=8,
    num_kv_heads=2 * KV_HEADS,
    intermediate_size=512,
    vocab_size=1000,
    embedding_size=1000,
    max_positions=LENGTH,
    norm_eps=1e-6,
    rope_theta=1e4,
)


def config() -> Any:
    model = SimpleNamespace(
        model="dir/tiny",
        architectures=["LLaDAModelLM"],
        dtype=torch.bfloat16,
        max_model_len=LENGTH,
        enforce_eager=True,
        get_num_layers=lambda parallel: LAYERS,
        get_num_kv_heads=lambda parallel: KV_HEADS,
        get_head_size=lambda: HEAD,
        hf_config=SimpleNamespace(shape=lambda: SHAPE),
    )
    return SimpleNamespace(
        model_config=model,
        scheduler_config=SimpleNamespace(max_num_seqs=SLOTS, max_num_batched_tokens=2048, async_scheduling=True),
        parallel_config=SimpleNamespace(tensor_parallel_size=2),
        cache_config=SimpleNamespace(block_size=BLOCK),
        device_config=SimpleNamespace(device_type="cuda"),
    )


def test_ten_lines_with_the_numbers() -> None:
    lines = plan_lines(config(), parse_server_options(None), 640)
    assert len(lines) == 10
    by_name = dict(line.split(": ", 1) for line in lines)
    assert by_name["model"] == "dir/tiny (LLaDAModelLM), bfloat16, 1024 positions a request"
    assert by_name["decoding unless a request says otherwise"] == "policy d2cache"
    assert by_name["budget"].endswith("for 512 + 256 positions; results are exact")
    assert by_name["batch"] == "8 requests and 2048 rows a step at most"
    in_parts = plan_lines(config(), parse_server_options({"part_rows": 512}), 640)
    assert "batch: 8 requests and 2048 rows a step at most, of which a layer computes 512 at a time" in in_parts
    kv = 2 * LAYERS * KV_HEADS * HEAD * 2 * 640 * BLOCK / 2**20
    assert f"640 blocks of 16, 10240 positions: 10 requests of the longest kind; {kv:.1f} MiB" in by_name["KV cache"]
    rows = 32 + 1 + 77  # current_k, a commit, a tenth of 768 positions
    held = LAYERS * rows * 768 * 4 * 1.25 / 2**20
    running = by_name["memory of running requests"]
    assert running.startswith(
        f"2048.0 MiB for maps and stored outputs, of which one of 512 + 256 positions takes {held:.1f}"
    )
    queries = LAYERS * 2048 * 4 * (HEAD * 2 + 4) / 2**20
    step = by_name["memory of a step, beside the forward pass"]
    assert step.startswith(f"queries {queries:.1f} MiB, parts of attention ")
    assert ", then statistics " in step
    assert by_name["execution"] == "eager"
    assert by_name["scheduling"] == "asynchronous"
    on_gpu = config()
    on_gpu.model_config.enforce_eager = False
    (execution,) = (x for x in plan_lines(on_gpu, parse_server_options(None), 1) if x.startswith("execution: "))
    assert execution == (
        "execution: CUDA graphs for refresh steps of up to 512 rows, eager for first steps and larger ones"
    )
    assert "execution: eager" in plan_lines(on_gpu, parse_server_options({"graph_rows": 0}), 1)
    assert by_name["traces"] == "off"


def test_what_the_operator_chose() -> None:
    options = parse_server_options({"policy": "full", "threshold": 0.9, "trace_dir": "/x", "refresh_budget": 32})
    by_name = dict(line.split(": ", 1) for line in plan_lines(config(), options, 640))
    chosen = by_name["decoding unless a request says otherwise"]
    assert chosen.startswith("policy full, ")
    assert {"threshold=0.9", "window=32"} <= set(chosen.split(", "))
    assert "refresh_budget=32" in by_name["budget"]
    assert "positions takes 0.0 MiB" in by_name["memory of running requests"]
    assert by_name["traces"].startswith("/x ")


def test_canvas_bytes_are_those_of_the_tensors() -> None:
    states = CanvasStates(3, 50, torch.device("cpu"), FamilyTraits(1))
    assert state_bytes(3, 50) == sum(t.nbytes for t in vars(states).values() if isinstance(t, torch.Tensor))
