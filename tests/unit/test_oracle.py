"""The decoding loop against traces of the published implementation, on a dense model: no vLLM."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.reference.llada import DenseLlada
from tests.reference.loop import Job, run_jobs
from tests.reference.oracle import ORACLE, case_names, load_case

CASES = case_names()


def test_there_are_traces() -> None:
    assert len(CASES) >= 12


@pytest.mark.parametrize("name", CASES)
def test_trace_is_reproduced_step_by_step(name: str) -> None:
    case = load_case(name)
    job = Job(case.prompt, case.canvas_length, case.options)
    run_jobs([DenseLlada(ORACLE / "llada")], [job])
    for step, (got, want) in enumerate(zip(job.steps, case.steps, strict=True)):
        assert got == want, f"step {step}"
    assert job.output == case.final_tokens


def test_all_traces_in_one_batch_at_different_phases() -> None:
    cases = [load_case(name) for name in CASES]
    jobs = [Job(c.prompt, c.canvas_length, c.options) for c in cases]
    models = [DenseLlada(ORACLE / "llada") for _ in cases]
    run_jobs(models, jobs, start_at=[3 * i for i in range(len(cases))])
    for case, job in zip(cases, jobs, strict=True):
        assert job.steps == case.steps, case.name
        assert job.output == case.final_tokens, case.name


@pytest.mark.parametrize("row", range(3))
def test_dense_model_gives_the_published_logits(row: int) -> None:
    golden = np.load(ORACLE / "traces" / "golden_llada.npz")
    padding = int((golden["attention_mask"][row] == 0).sum())
    ids = torch.from_numpy(golden["input_ids"][row, padding:])
    model = DenseLlada(ORACLE / "llada")
    model.reset(len(ids))
    hidden, _ = model.forward(ids, torch.arange(len(ids)))
    want = torch.from_numpy(golden["logits_masked_batch"][row, padding:])
    assert torch.allclose(model.lm_head(hidden), want, rtol=0, atol=1e-4)
