"""The engine half of the GPU benchmark, on CPU with an engine that is there anyway: its numbers mean nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu.engine import TINY, Case, Engine, cases, prompt_lengths, served
from benchmarks.gpu.report import Results
from benchmarks.gpu.timing import Ceilings

pytestmark = [pytest.mark.vllm, pytest.mark.engine]

LIMITS = Ceilings(1e9, 1e9)


@pytest.fixture(scope="module")
def driven(engine: Any) -> Engine:
    return Engine("LLaDA-8B", "torch", engine.llm)


def test_steps_of_every_case(driven: Engine, tmp_path: Path) -> None:
    measured = [driven.measure(case, LIMITS, steps=2) for case in cases(["full", "d2cache"], [48], [1, 3], [], [16])]
    measured.append(driven.measure(Case("full", "code+8", [5, 7, 6], 8), LIMITS, steps=2))
    for step in measured:
        assert step.running == step.requests
        assert 0 < step.forward_ms < step.step_ms
        assert 0 < step.outside < 1
        assert step.execution in ("eager", "graphs")
    by_policy = {s.policy: s for s in measured[:2]}
    assert by_policy["full"].rows == by_policy["full"].length == 48
    assert by_policy["d2cache"].rows < 48
    assert measured[-1].rows == 5 + 7 + 6 + 3 * 8
    assert not driven.engine.has_unfinished_requests()
    assert "forward" not in vars(driven.model)

    results = Results({"device": "none", "torch": torch.__version__, "commit": "x"}, LIMITS, steps=measured)
    results.show()
    results.plot(tmp_path / "plot.png")
    results.write(tmp_path / "gpu.json")
    assert [s["workload"] for s in json.loads((tmp_path / "gpu.json").read_text())["steps"]][-1] == "code+8"


def test_a_profile_finds_its_place_in_the_page(driven: Engine, tmp_path: Path) -> None:
    table = driven.profile(Case("d2cache", "", [20], 8), steps=1)
    assert "aten::" in table
    machine = {"device": "none", "torch": "2", "commit": "x"}
    page = tmp_path / "page.md"
    page.write_text((Path(__file__).parents[2] / "docs/performance.md").read_text())
    for content in ("one", table):
        Results(machine, LIMITS, profile=content).document(page)
    assert page.read_text().count("none, torch 2, commit x") == 1
    assert "aten::" in page.read_text()
    assert page.read_text().endswith((Path(__file__).parents[2] / "docs/performance.md").read_text()[-200:])
    page.write_text("no place")
    with pytest.raises(ValueError, match="no place for a profile"):
        Results(machine, LIMITS).document(page)


def test_workloads_and_families() -> None:
    lengths = prompt_lengths()
    assert set(lengths) == {"gsm8k", "humaneval"}
    assert all(20 < n < 800 for counts in lengths.values() for n in counts)
    many = cases(["full"], [512], [1, 64], ["gsm8k", "humaneval"], [256, 512])
    assert len(many) == 1 + 2 * 2 * 2
    assert [len(c.prompts) for c in many[1:3]] == [1, 64]
    assert all(served(family) for family in TINY)
