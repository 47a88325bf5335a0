"""A step asks no more of a device than ``make count`` has written down."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.count.__main__ import BLOCK, BLOCK_SETTINGS, SETTINGS, measure, release
from vllm_d2cache.canvas.view import OptionColumns
from vllm_d2cache.ops import texts

ROOT = Path(__file__).parents[3]
COUNTED = json.loads((ROOT / "benchmarks" / "results" / "count.json").read_text())
WRITTEN = COUNTED["lines"]
LINES = [line for line in WRITTEN if line["setting"] in SETTINGS | BLOCK_SETTINGS and line["batch"] in (1, 8)]


@pytest.mark.parametrize("line", LINES, ids=lambda line: f"{line['setting']}-{line['batch']}-{line['form']}")
def test_no_step_has_more_kernels_or_waits_than_documented(line: dict[str, Any]) -> None:
    asked, block = (SETTINGS | BLOCK_SETTINGS)[line["setting"]], BLOCK if line["setting"] in BLOCK_SETTINGS else 0
    found = measure([asked] * line["batch"], line["form"] == "padded", block=block, text=tuple(line["text"]))
    if release() == COUNTED["torch"]:
        # Another PyTorch may make an operator of others.
        assert found["kernels"] <= line["kernels"]
    assert found["triton"] <= line["triton"]
    assert found["waits"] <= line["waits"]


def test_a_step_of_the_default_policy_has_few_kernels_whatever_the_batch() -> None:
    default = [line for line in WRITTEN if line["setting"] in ("d2cache", "full", "block")]
    assert {line["batch"] for line in default} == {1, 8, 32, 64}
    kernels = {(x["setting"], x["batch"], x["form"]): x["kernels"] + x["triton"] for x in default}
    assert max(kernels.values()) <= 60
    assert max(count for (name, _, form), count in kernels.items() if (name, form) == ("d2cache", "padded")) <= 20


def test_padded_steps_wait_for_nothing_and_exact_ones_once() -> None:
    default = [line for line in WRITTEN if line["setting"].startswith(("d2cache", "full", "block"))]
    assert {(line["form"], line["waits"]) for line in default} == {("padded", 0), ("exact", 1)}


@pytest.mark.parametrize(
    ("result", "begin"),
    [
        ("count", "## Kernels outside the layers"),
        ("grid-triton-3.8", "`make count` prints, without a GPU, how"),
    ],
)
def test_the_document_shows_the_figures_of_the_command(result: str, begin: str) -> None:
    printed = set((ROOT / "benchmarks" / "results" / f"{result}.md").read_text().splitlines())
    section = (ROOT / "docs" / "performance.md").read_text().split(begin)[1].split("\n##")[0]
    shown = [line for line in section.splitlines() if line.startswith("|")]
    assert len(shown) > 2
    assert set(shown) <= printed


@pytest.mark.parametrize("result", ["grid", "grid-triton-3.7", "grid-triton-3.8"])
def test_a_lone_request_fills_a_card(result: str) -> None:
    """Programs with work, LLaDA-8B at 1,024 positions, and no kernel spills: what documents promise."""
    grid = json.loads((ROOT / "benchmarks" / "results" / f"{result}.json").read_text())
    (line,) = (x for x in grid["grids"] if x["model"] == "LLaDA-8B" and x["length"] == 1024)
    assert line["attention"][0] >= 120
    assert line["map"][0] >= 240
    assert len({x["architecture"] for x in grid["resources"]}) == 6
    assert not [x for x in grid["resources"] if x["local"]]


def test_tables_have_the_columns_that_kernels_read_by_number() -> None:
    assert OptionColumns._fields == texts.OPTIONS
    assert set(texts.FLOATS) < set(texts.OPTIONS)
    assert texts.INTEGERS[5:] == ("window", "tokens_per_step", "score", "steps", "longest_run")
