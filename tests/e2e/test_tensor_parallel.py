"""Two ranks give what one gives: traces through the multi-process engine, in a process of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.reference.oracle import load_case

pytestmark = [pytest.mark.vllm, pytest.mark.engine, pytest.mark.slow]

SCRIPT = """
import json, sys
from vllm import LLM, SamplingParams
from tests.reference.oracle import ORACLE, load_case

if __name__ == "__main__":
    cases = [load_case(name) for name in sys.argv[1:]]
    model = str(ORACLE / cases[0].name.split(".")[0])
    llm = LLM(model, dtype="float32", skip_tokenizer_init=True, max_num_seqs=4, max_model_len=256,
              tensor_parallel_size=2)
    params = [SamplingParams(temperature=0, max_tokens=c.canvas_length, ignore_eos=True, detokenize=False,
                             extra_args={f"d2cache_{k}": v for k, v in c.options.items()}) for c in cases]
    outputs = llm.generate([{"prompt_token_ids": c.prompt} for c in cases], params, use_tqdm=False)
    print("TOKENS", json.dumps([list(o.outputs[0].token_ids) for o in outputs]))
"""
CASES = [
    ["llada.d2fixmask_default", "llada.d2fixmask_semi8_thr", "llada.nocache_sigma10"],
    ["dream.d2fixmask_default", "dream.nocache_nar"],
]


@pytest.mark.parametrize("names", CASES, ids=["llada", "dream"])
def test_two_ranks_reproduce_the_traces(names: list[str], tmp_path: Path) -> None:
    script = tmp_path / "two_ranks.py"
    script.write_text(SCRIPT)
    root = str(Path(__file__).resolve().parents[2])
    environment = {k: v for k, v in os.environ.items() if k != "VLLM_ENABLE_V1_MULTIPROCESSING"}
    environment |= {"PYTHONPATH": root, "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, str(script), *names], env=environment, capture_output=True, text=True, timeout=500, check=False
    )
    lines = [line for line in run.stdout.splitlines() if line.startswith("TOKENS ")]
    assert lines, run.stdout[-2000:] + run.stderr[-4000:]
    tokens = json.loads(lines[0].removeprefix("TOKENS "))
    assert tokens == [load_case(name).final_tokens for name in names]
