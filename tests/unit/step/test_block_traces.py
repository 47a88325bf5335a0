"""The published traces of block diffusion through the StepRunner, step by step (tests/data/oracle/block)."""

from __future__ import annotations

from typing import Any

import pytest

from tests.reference.blocks import BLOCK_ORACLE, load_trace, trace_names
from tests.unit.blocks import BlockStep, job_of, run
from tests.unit.models.test_block_oracle import MODELS


def wanted_steps(trace: dict[str, Any]) -> list[dict[str, Any]]:
    """The forwards that decide something: what a trace stores in forwards of their own rides on the next one here."""
    return [step for step in trace["steps"] if step["kind"] == "denoise" or step.get("committed")]


def check_step(got: BlockStep, want: dict[str, Any], sampled: bool) -> None:
    """One step against a forward of the trace.

    Args:
        sampled: confidences of the trace are not those that its loop went by.
    """
    assert got.committed == want["committed"]
    assert got.edited == want.get("edited", [])
    assert got.limits == sorted(got.limits)
    if want["kind"] != "denoise":
        # The forward that stores a block gives the next one's first token, which nothing else may.
        assert (got.rows[-1] + 1, len(got.committed)) == (got.committed[0][0], 1)
        return
    end, tokens = want["rows"][1], want["tokens_in"]
    assert got.rows[-len(tokens) :] == list(range(end - len(tokens), end))
    assert got.tokens_in[-len(tokens) :] == tokens
    judgements = zip(want["argmax"], want["confidence"], strict=True)
    known = dict(zip(range(end - len(tokens), end), judgements, strict=True))
    judged = {p for p, (_, confidence) in known.items() if confidence is not None}
    assert {p for p, _ in got.committed} <= got.predicted.keys() <= judged
    for position, (token, confidence) in got.predicted.items():
        assert token == known[position][0]
        assert confidence == pytest.approx(1.0 if sampled else known[position][1], abs=2e-5)


@pytest.mark.parametrize("name", trace_names())
def test_trace_is_reproduced_step_by_step(name: str) -> None:
    trace = load_trace(name)
    job = run(job_of(trace), MODELS[trace["checkpoint"]](BLOCK_ORACLE / trace["checkpoint"]))
    wanted = wanted_steps(trace)
    for i, got in enumerate(job.steps):
        check_step(got, wanted[i], trace["settings"].get("loop") == "generate.py")
    assert job.output == trace["output_ids"][: len(job.output)]
    # The released loops go on to the end of a block, and some to the end of the canvas, when an end token stands.
    left = wanted[len(job.steps) :]
    if job.sampling.stop_token_ids:
        assert job.output[-1] in job.sampling.stop_token_ids
    else:
        assert len(job.output) == job.max_tokens
        # A block that sticks out is not written to its end, and the last one never stored.
        last = (len(job.prompt) + job.max_tokens - 1) // job.block_length
        assert all(step["block"] == last for step in left)


@pytest.mark.parametrize("name", [name for name in trace_names() if not name.startswith("fast_dllm_v2")])
def test_a_finished_block_costs_no_forward_of_its_own(name: str) -> None:
    """Its rows ride on the next block's first step, unless the step that finished it changed nothing."""
    trace = load_trace(name)
    job = run(job_of(trace), MODELS[trace["checkpoint"]](BLOCK_ORACLE / trace["checkpoint"]))
    length, prompt = job.block_length, len(job.prompt)
    assert job.steps[0].rows == list(range(prompt - prompt % length + length))
    for last, step in zip(job.steps, job.steps[1:], strict=False):
        entered = step.rows[-1] != last.rows[-1]
        changed = bool(last.committed or last.edited)
        assert len(step.rows) == (2 if entered and changed else 1) * length


@pytest.mark.parametrize("name", trace_names()[::11])
def test_a_prompt_in_pieces_gives_the_same_steps(name: str) -> None:
    """Its first step has the rows that are left; all others are the same."""
    trace = load_trace(name)
    model = MODELS[trace["checkpoint"]](BLOCK_ORACLE / trace["checkpoint"])
    whole = run(job_of(trace), model).steps
    parts = run(job_of(trace), model, piece=2 * trace["settings"]["block_length"]).steps
    length, prompt = trace["settings"]["block_length"], len(trace["prompt_ids"])
    open_block = prompt - prompt % length
    assert [s.committed for s in parts] == [s.committed for s in whole]
    assert [s.rows for s in parts[1:]] == [s.rows for s in whole[1:]]
    first = open_block - length * job_of(trace).shift
    assert parts[0].rows == whole[0].rows[max(0, first) :]
