"""vllm-d2cache compare, as a user runs it: an engine of its own, a table, a JSON file and a plot."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.reference.blocks import BLOCK_ORACLE

pytestmark = [pytest.mark.vllm, pytest.mark.engine]

ROOT = Path(__file__).resolve().parents[2]


def test_compare(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    lines = (ROOT / "examples" / "tiny_prompts.jsonl").read_text().splitlines()[:2]
    prompts.write_text("\n".join([*lines, json.dumps({"prompt": "abc", "max_tokens": 12})]))
    out, picture = tmp_path / "out.json", tmp_path / "out.png"
    command = [sys.executable, "-m", "vllm_d2cache.cli", "compare", "--model", str(ROOT / "models" / "tiny-llada")]
    command += ["--policies", "d2cache:current_k=4", "--decoders", "confidence:tokens_per_step=2", "wino"]
    command += ["--prompts", str(prompts), "--max-model-len", "512", "--dtype", "float32"]
    command += ["--out", str(out), "--plot", str(picture)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "left out: d2cache:current_k=4, wino" in done.stdout

    report = json.loads(out.read_text())
    cells = {(cell["policy"], cell["decoder"]): cell for cell in report["cells"]}
    full, small = (cells[policy, "confidence:tokens_per_step=2"] for policy in ("full", "d2cache:current_k=4"))
    assert set(cells) - {("full", "wino")} == {(c["policy"], c["decoder"]) for c in (full, small)}
    for cell in cells.values():
        assert cell["canvas_tokens"] == sum(json.loads(line)["max_tokens"] for line in prompts.read_text().splitlines())
        assert 0 < cell["output_tokens"] <= cell["canvas_tokens"]
        assert cell["forwards"] == cell["steps"] > 0
        assert cell["seconds"] > 0
    assert full["agreement"] == full["identical"] == 1.0
    assert full["rows"] == full["keys"], "full recompute: a row for every key"
    assert small["rows"] < small["keys"] / 2
    assert full["committed_tokens"] <= 2 * full["steps"]
    assert picture.stat().st_size > 0
    table = out.with_suffix(".md").read_text()
    assert table.count("\n| ") == 4


def test_compare_where_texts_are_cut_into_blocks(tmp_path: Path) -> None:
    """Without names: what has a meaning there is run, the rest is said, and nobody finds another's prompts stored."""
    model = tmp_path / "model"
    shutil.copytree(BLOCK_ORACLE / "llada2", model)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ROOT / "models" / "tiny-llada" / name, model / name)
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "out.json"
    prompts.write_text("\n".join(json.dumps({"prompt": letter * 150, "max_tokens": 40}) for letter in "ab"))
    command = [sys.executable, "-m", "vllm_d2cache.cli", "compare", "--model", str(model), "--decoders", "confidence"]
    command += ["--prompts", str(prompts), "--max-model-len", "256", "--dtype", "float32", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "left out: dkv, confidence: d2cache_policy: must be" in done.stdout
    cells = {cell["policy"]: cell for cell in json.loads(out.read_text())["cells"]}
    assert set(cells) == {"full", "d2cache", "block"}
    full, block, part = cells["full"], cells["block"], cells["d2cache"]
    assert block["agreement"] == full["agreement"] == 1.0
    assert (block["rows"], block["steps"]) == (full["rows"], full["steps"])
    assert block["rows"] > 2 * 150, "the prompts, once more for each setting"
    assert part["rows"] / part["steps"] < block["rows"] / block["steps"]
    assert "| rows/token |" in out.with_suffix(".md").read_text()
