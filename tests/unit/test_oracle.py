"""The decoding loop against traces of the published implementation, on a dense model: no vLLM."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.reference.dense import DenseModel
from tests.reference.dream import DenseDream
from tests.reference.llada import DenseLlada
from tests.reference.loop import Job, run_jobs
from tests.reference.oracle import ORACLE, case_names, load_case

MODELS: dict[str, type[DenseModel]] = {"llada": DenseLlada, "dream": DenseDream}
CASES = [name for family in MODELS for name in case_names(family)]


def dense_model(family: str) -> DenseModel:
    return MODELS[family](ORACLE / family)


@pytest.mark.parametrize(("family", "count"), [("llada", 9), ("dream", 2)])
def test_there_are_traces(family: str, count: int) -> None:
    assert len(case_names(family)) >= count


@pytest.mark.parametrize("name", CASES)
def test_trace_is_reproduced_step_by_step(name: str) -> None:
    case = load_case(name)
    job = Job(case.prompt, case.canvas_length, case.options)
    run_jobs([dense_model(name.split(".")[0])], [job])
    for step, (got, want) in enumerate(zip(job.steps, case.steps, strict=True)):
        assert got == want, f"step {step}"
    assert job.output == case.final_tokens


@pytest.mark.parametrize("family", MODELS)
def test_all_traces_in_one_batch_at_different_phases(family: str) -> None:
    cases = [load_case(name) for name in case_names(family)]
    jobs = [Job(c.prompt, c.canvas_length, c.options) for c in cases]
    models = [dense_model(family) for _ in cases]
    run_jobs(models, jobs, start_at=[3 * i for i in range(len(cases))])
    for case, job in zip(cases, jobs, strict=True):
        assert job.steps == case.steps, case.name
        assert job.output == case.final_tokens, case.name


@pytest.mark.parametrize("row", range(3))
@pytest.mark.parametrize("family", MODELS)
def test_dense_model_gives_the_published_logits(family: str, row: int) -> None:
    golden = np.load(ORACLE / "traces" / f"golden_{family}.npz")
    padding = int((golden["attention_mask"][row] == 0).sum())
    ids = torch.from_numpy(golden["input_ids"][row, padding:])
    model = dense_model(family)
    model.reset(len(ids))
    hidden, _ = model.forward(ids, torch.arange(len(ids)))
    want = torch.from_numpy(golden["logits_masked_batch"][row, padding:])
    assert torch.allclose(model.lm_head(hidden), want, rtol=0, atol=1e-4)
