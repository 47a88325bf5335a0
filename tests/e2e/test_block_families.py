"""The block-diffusion families through the engine: published traces step by step, all of a block length at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import Engine
from tests.reference.blocks import BLOCK_ORACLE, load_trace, trace_names
from tests.unit.blocks import job_of
from tests.unit.step.test_block_traces import wanted_steps

pytestmark = [pytest.mark.vllm, pytest.mark.engine]

# A checkpoint and a block length; the others are the StepRunner's (tests/unit/step/test_block_traces.py).
ENGINES = [("sdar", 4), ("sdar", 8), ("llada2", 8), ("llada2", 32), ("sdar_moe", 4), ("fast_dllm_v2", 8)]


def request_of(trace: dict[str, Any]) -> dict[str, Any]:
    job = job_of(trace)
    sampling = {"stop_token_ids": list(job.sampling.stop_token_ids), "temperature": job.sampling.temperature}
    if job.sampling.top_k:
        sampling["top_k"] = job.sampling.top_k
    return {"prompt": job.prompt, "max_tokens": job.max_tokens, "options": job.options, "sampling": sampling}


@pytest.mark.parametrize(("checkpoint", "length"), ENGINES)
def test_all_traces_through_generate(checkpoint: str, length: int, tmp_path: Path) -> None:
    found = [load_trace(name) for name in trace_names()]
    traces = [t for t in found if t["checkpoint"] == checkpoint and t["settings"]["block_length"] == length]
    assert traces
    requests = [request_of(trace) for trace in traces]
    engine = Engine(tmp_path, model=str(BLOCK_ORACLE / checkpoint), hf_overrides={"block_size": length})
    try:
        together = engine.run(requests)
        assert engine.tokens(requests[:1]) == [together[0][0]]
        longest = engine.llm.llm_engine.model_config.max_model_len
        # A last block that ends with the longest text there is, and one that ends within it.
        edges = [{"prompt": [64] * (longest - left), "max_tokens": asked} for left, asked in ((3, 3), (2, 1), (1, 1))]
        assert [len(tokens) for tokens in engine.tokens(edges)] == [3, 1, 1]
    finally:
        engine.close()
    for trace, (tokens, lines) in zip(traces, together, strict=True):
        wanted, prompt = wanted_steps(trace), len(trace["prompt_ids"])
        for want, line in zip(wanted, lines[1:-1], strict=False):
            assert [[prompt + slot, token] for slot, token in line["committed"]] == want["committed"], trace["case"]
            edited = [[position, new] for position, _, new in want.get("edited", [])]
            assert [[prompt + slot, token] for slot, token in line.get("edited", [])] == edited, trace["case"]
        assert tokens == trace["output_ids"][: len(tokens)], trace["case"]
        reason = "stop" if tokens[-1] in trace["settings"]["eos_ids"] else "length"
        assert lines[-1] == {"output_token_ids": tokens, "finish_reason": reason}, trace["case"]
        assert len(tokens) == job_of(trace).max_tokens or tokens[-1] in trace["settings"]["eos_ids"]
