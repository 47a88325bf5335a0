"""A policy with a mechanism of its own, from another distribution, in the real engine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.options.test_plugins import ROOT, install

pytestmark = [pytest.mark.vllm, pytest.mark.engine]

PROGRAM = """
import json
from vllm import LLM, SamplingParams

llm = LLM("models/tiny-llada", dtype="float32", max_model_len=256, enable_prefix_caching=False)
settings = [{"d2cache_policy": "key_norm", "d2cache_smallest": n} for n in (100000, 4)]
settings.append({"d2cache_policy": "full", "d2cache_sigma": 0.0})  # the example has no certainty prior
settings.append({"d2cache_policy": "full", "d2cache_decoder": "leftmost", "d2cache_run": 4})
params = [
    SamplingParams(
        temperature=0, max_tokens=24, ignore_eos=True, extra_args={**s, "d2cache_window": 8, "d2cache_report": 1}
    )
    for s in settings
]
prompt = llm.get_tokenizer().encode("Reverse: stream of words")
outputs = llm.generate([{"prompt_token_ids": prompt}] * len(params), params)
found = [[list(o.outputs[0].token_ids), o.kv_transfer_params["d2cache"], len(prompt)] for o in outputs]
print(json.dumps(found))
"""


def test_a_mechanism_from_outside_runs_in_the_engine(tmp_path: Path) -> None:
    for example in ("policy_plugin", "decoder_plugin"):
        install(tmp_path, example)
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    environment = {**os.environ, "PYTHONPATH": path, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=environment, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    everything, some, full, leftmost = json.loads(done.stdout.splitlines()[-1])
    assert everything[0] == full[0], "with all positions it is full recompute"
    positions = full[2] + 24
    assert full[1]["rows_refreshed"] == full[1]["steps"] * positions
    assert some[1]["rows_refreshed"] < some[1]["steps"] * positions / 2, "few positions are computed again"
    assert (full[1]["steps"], leftmost[1]["steps"]) == (24, 6), "four tokens a step, two steps a window"
