"""The trace files: one line a step, as docs/tracing.md describes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.batches import MASK, Batch, FakeJob
from vllm_d2cache.canvas.request import Request
from vllm_d2cache.observe.trace import TraceRecorder, _file_name
from vllm_d2cache.options.request import RequestOptions
from vllm_d2cache.options.sampling import SamplingSpec
from vllm_d2cache.step.runner import Closed
from vllm_d2cache.step.step import Step


class TracedBatch(Batch):
    """A batch whose requests are traced."""

    def __init__(self, jobs: list[FakeJob], directory: Path, **settings: Any) -> None:
        super().__init__(jobs, **settings)
        self.tracer = TraceRecorder(str(directory), "tiny")

    def add(self, i: int) -> None:
        super().add(i)
        slot = self.slot(i)
        self.tracer.start(slot, self.runner.canvas.requests[slot], self.jobs[i].prompt)

    def _record(self, running: list[int], step: Step, closed: Closed) -> None:
        super()._record(running, step, closed)
        self.tracer.step(closed.rows, closed.result, self.runner.canvas, closed.stats.confidence)


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_file_tells_the_whole_request(tmp_path: Path) -> None:
    jobs = [
        FakeJob([1, 2, 3], 6, {"current_k": 2, "tokens_per_step": 2}, noise=1),
        FakeJob([4] * 9, 11, {"policy": "full", "window": 4}, noise=2),
        FakeJob([4], 5, {"threshold": 0.2}, noise=3),
    ]
    TracedBatch(jobs, tmp_path / "made" / "here").run([0, 1, 4])
    for i, job in enumerate(jobs):
        head, *steps, tail = read(tmp_path / "made" / "here" / f"r{i}.jsonl")
        assert list(head) == ["request_id", "prompt_token_ids", "canvas_length", "options", "model"]
        assert head["request_id"] == f"r{i}"
        assert (head["prompt_token_ids"], head["canvas_length"]) == (job.prompt, job.canvas_length)
        assert RequestOptions(**head["options"]).policy == job.options.get("policy", "d2cache")
        assert [s["step"] for s in steps] == list(range(len(job.steps)))
        for line, step in zip(steps, job.steps, strict=True):
            assert list(line) == ["step", "refreshed", "committed", "masked_left", "confidence", "elapsed"]
            assert line["refreshed"] == (None if step.full else step.refreshed)
            assert line["committed"] == [list(pair) for pair in step.committed]
            assert line["masked_left"] == len(step.masked)
            assert len(line["confidence"]) == len(line["committed"])
            assert all(0 < c <= 1 for c in line["confidence"])
        times = [0.0, *(s["elapsed"] for s in steps)]
        assert times == sorted(times)
        assert tail == {"output_token_ids": job.output, "finish_reason": "length"}


def test_confidence_is_the_probability_of_the_committed_token(tmp_path: Path) -> None:
    job = FakeJob([1, 2], 4, {"policy": "full"}, noise=1)
    logits = job.numbers()[0]
    logits[:, MASK] = -torch.inf  # keeps its share of the softmax, but is never the token
    TracedBatch([job], tmp_path).run()
    (slot, token), *_ = read(tmp_path / "r0.jsonl")[1]["committed"]
    plain = FakeJob([1, 2], 4, noise=1).numbers()[0][2 + slot].softmax(0)[token]
    assert read(tmp_path / "r0.jsonl")[1]["confidence"][0] == pytest.approx(float(plain), abs=2e-6)
    assert token == int(logits[2 + slot].argmax())


def test_a_stop_token_ends_the_output(tmp_path: Path) -> None:
    stop = tuple(t for t in range(13) if t % 2)
    job = FakeJob([1], 12, {"tokens_per_step": 12}, SamplingSpec(stop_token_ids=stop), noise=5)
    TracedBatch([job], tmp_path).run()
    tail = read(tmp_path / "r0.jsonl")[-1]
    assert tail["finish_reason"] == "stop"
    output = tail["output_token_ids"]
    assert output[-1] in stop
    assert not set(output[:-1]) & set(stop)
    assert output == job.output[: len(output)]


def test_an_answer_that_ends_inside_its_last_block(tmp_path: Path) -> None:
    """Its file ends as the answer does, and says so, though more is written by then or would be."""
    job = FakeJob([1], 12, {"tokens_per_step": 12})
    batch = TracedBatch([job], tmp_path)
    batch.add(0)
    batch.runner.canvas.requests[batch.slot(0)].wanted = 5
    batch.step([0])
    batch.tracer.finish(batch.slot(0), "abort")  # as for every request that has left
    assert read(tmp_path / "r0.jsonl")[-1] == {"output_token_ids": job.output[:5], "finish_reason": "length"}
    assert len(job.output) == 12


def test_an_abort_ends_the_file_once(tmp_path: Path) -> None:
    job = FakeJob([1], 6)
    batch = TracedBatch([job], tmp_path)
    batch.add(0)
    batch.step([0])
    batch.tracer.finish(batch.slot(0), "abort")
    batch.tracer.finish(batch.slot(0), "abort")
    lines = read(tmp_path / "r0.jsonl")
    assert len(lines) == 3
    assert lines[-1] == {"output_token_ids": job.output, "finish_reason": "abort"}
    batch.step([0])  # the engine may be one step ahead of an abort
    assert len(read(tmp_path / "r0.jsonl")) == 3


@pytest.mark.parametrize("steps", range(1, 8))
def test_a_restart_begins_the_file_anew_and_still_has_all_of_the_output(tmp_path: Path, steps: int) -> None:
    first = FakeJob([1, 2], 8, noise=4)
    batch = TracedBatch([first], tmp_path)
    batch.add(0)
    for _ in range(steps):
        batch.step([0])
    slot = batch.slot(0)
    batch.tracer.finish(slot, "abort")
    batch.runner.remove(slot)
    again = first.fresh()
    again.emitted_before = len(first.output)
    batch.jobs = [again]
    batch.add(0)
    while not again.done:
        batch.step([0])
    head, *lines, tail = read(tmp_path / "r0.jsonl")
    assert head["request_id"] == "r0"
    assert len(lines) == 8
    assert tail == {"output_token_ids": first.output + again.output, "finish_reason": "length"}


def trace_of(tmp_path: Path, *req_ids: str) -> list[str]:
    tracer = TraceRecorder(str(tmp_path), "tiny")
    for slot, req_id in enumerate(req_ids):
        request = Request(req_id, 1, 4, RequestOptions(), SamplingSpec())
        tracer.start(slot, request, [7])
        tracer.finish(slot, "abort")
    return sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.jsonl"))


def test_request_ids_become_harmless_file_names(tmp_path: Path) -> None:
    assert trace_of(tmp_path, "../a/b c", "cmpl-1_2.3") == [".._a_b_c.jsonl", "cmpl-1_2.3.jsonl"]


@pytest.mark.parametrize("letter", ["x", "ü", "漢"])
def test_long_request_ids_have_files_of_their_own(tmp_path: Path, letter: str) -> None:
    names = trace_of(tmp_path, letter * 999, letter * 998)
    assert len(names) == 2
    assert all(len(name.encode()) < 250 for name in names)


def test_nobody_else_can_read_a_trace(tmp_path: Path) -> None:
    directory = tmp_path / "made"
    trace_of(directory, "a")
    assert directory.stat().st_mode & 0o777 == 0o700
    assert (directory / "a.jsonl").stat().st_mode & 0o777 == 0o600


def test_a_link_in_the_directory_is_not_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / "traces").mkdir()
    (tmp_path / "traces" / "a.jsonl").symlink_to(victim)
    with pytest.raises(OSError):
        trace_of(tmp_path / "traces", "a")
    assert victim.read_text() == "precious"


@given(st.text(min_size=1, max_size=300))
def test_no_request_id_leaves_the_directory(req_id: str) -> None:
    name = _file_name(req_id) + ".jsonl"
    assert Path(name).name == name
    assert name not in (".", "..")
    assert len(name.encode()) < 250
