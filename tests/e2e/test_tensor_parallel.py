"""Two ranks give what one gives: traces through the multi-process engine, in a process of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.reference.blocks import BLOCK_ORACLE, load_trace, trace_names
from tests.reference.loop import Job, run_jobs
from tests.reference.oracle import ORACLE, load_case
from tests.unit.blocks import job_of
from tests.unit.test_oracle import MODELS

pytestmark = [pytest.mark.vllm, pytest.mark.engine, pytest.mark.slow]

SCRIPT = """
import json, sys
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    cases = json.loads(sys.argv[2])
    llm = LLM(sys.argv[1], dtype="float32", skip_tokenizer_init=True, max_num_seqs=4, max_model_len=256,
              tensor_parallel_size=2)
    params = [SamplingParams(temperature=0, max_tokens=length, ignore_eos=True, detokenize=False, stop_token_ids=stops,
                             extra_args={f"d2cache_{k}": v for k, v in options.items()})
              for _, length, options, stops in cases]
    outputs = llm.generate([{"prompt_token_ids": case[0]} for case in cases], params, use_tqdm=False)
    print("TOKENS", json.dumps([list(o.outputs[0].token_ids) for o in outputs]))
"""
CASES = [
    ["llada.d2fixmask_default", "llada.d2fixmask_semi8_thr", "llada.nocache_sigma10"],
    ["dream.d2fixmask_default", "dream.nocache_nar"],
]


# Ranks hold different heads, and have to agree on the rows that a layer computes.
PARTIAL = [
    {"policy": "spa", "refresh_steps": 9, "refresh_gen_steps": 4, "max_update_ratio": 0.5, "proxy_rank": 8},
    {"policy": "dllm_cache", "kp": 7, "kr": 3, "rou": 0.3},
    {"policy": "es", "window": 12, "block_update_freq": 4},
]


@pytest.mark.parametrize("names", CASES, ids=["llada", "dream"])
def test_two_ranks_reproduce_the_traces(names: list[str], tmp_path: Path) -> None:
    """And what the reference denoises under policies whose layers compute a part of the rows."""
    family = names[0].split(".")[0]
    traces = [load_case(name) for name in names]
    jobs = [Job([3, 5, 7], 24, options) for options in PARTIAL]
    run_jobs([MODELS[family](ORACLE / family) for _ in jobs], jobs)
    cases = [(c.prompt, c.canvas_length, c.options, []) for c in traces]
    cases += [(j.prompt, j.canvas_length, j.options, []) for j in jobs]
    tokens = tokens_of_two_ranks(ORACLE / family, cases, tmp_path)
    assert tokens == [c.final_tokens for c in traces] + [j.output for j in jobs]


@pytest.mark.parametrize("checkpoint", ["sdar", "llada2"])
def test_two_ranks_reproduce_the_traces_of_texts_in_blocks(checkpoint: str, tmp_path: Path) -> None:
    """A dense network, and one whose experts stand on both ranks."""
    config = json.loads((BLOCK_ORACLE / checkpoint / "config.json").read_text())
    length = config.get("block_size", 32)
    traces = [load_trace(name) for name in trace_names()]
    traces = [t for t in traces if t["checkpoint"] == checkpoint and t["settings"]["block_length"] == length]
    jobs = [(job, trace) for trace in traces if not (job := job_of(trace)).sampling.temperature]
    cases = [(j.prompt, j.max_tokens, j.options, list(j.sampling.stop_token_ids)) for j, _ in jobs]
    assert len(cases) > 3
    found = tokens_of_two_ranks(BLOCK_ORACLE / checkpoint, cases, tmp_path)
    for tokens, (job, trace) in zip(found, jobs, strict=True):
        assert tokens == trace["output_ids"][: len(tokens)], trace["case"]
        assert len(tokens) == job.max_tokens or tokens[-1] in job.sampling.stop_token_ids


def tokens_of_two_ranks(model: Path, cases: list[Any], directory: Path) -> list[list[int]]:
    """What an engine with two ranks gives for prompts with max_tokens, options and stop tokens."""
    script = directory / "two_ranks.py"
    script.write_text(SCRIPT)
    root = str(Path(__file__).resolve().parents[2])
    environment = {k: v for k, v in os.environ.items() if k != "VLLM_ENABLE_V1_MULTIPROCESSING"}
    environment |= {"PYTHONPATH": root, "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script), str(model), json.dumps(cases)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500, check=False)
    lines = [line for line in run.stdout.splitlines() if line.startswith("TOKENS ")]
    assert lines, run.stdout[-2000:] + run.stderr[-4000:]
    return list(json.loads(lines[0].removeprefix("TOKENS ")))
