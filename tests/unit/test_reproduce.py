"""`make reproduce`, as far as it needs no server: local tasks, the record that a later run goes on from, the table."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from benchmarks.quality.harness import Score
from benchmarks.reproduce import humaneval_utils, local
from benchmarks.reproduce.local import MissingError, write_local_task
from benchmarks.reproduce.record import COLUMNS, SETTINGS, Record, filled
from vllm_d2cache.options.request import PREFIX
from vllm_d2cache.options.server import ServerOptions
from vllm_d2cache.requests.resolve import parse_request_options, resolve

PAGE = Path(__file__).resolve().parents[2] / "docs" / "reproduce.md"
HUMANEVAL = """task: humaneval
dataset_path: openai/openai_humaneval
doc_to_text: "{{prompt}}"
metric_list:
  - metric: !function utils.pass_at_k
    k: [1]
metadata:
  version: 1.0
"""
INSTRUCT = """include: humaneval.yaml
task: humaneval_instruct
doc_to_text: "Solve: {{ prompt }}"
filter_list:
  - name: "create_test"
    filter:
      - function: "custom"
        filter_fn: !function utils.build_predictions_instruct
"""


def score(task: str, setting: str, right: float = 50.0) -> Score:
    return Score(task, setting, "c", {}, 2, right, 1.0, 30, 64, 40, 20, 100, 200, 4.0, "10")


@pytest.fixture
def harness_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed harness, as far as its task files go."""
    tasks = tmp_path / "lib/python3.11/site-packages/lm_eval/tasks"
    for name, text in (("humaneval/humaneval", HUMANEVAL), ("humaneval/humaneval_instruct", INSTRUCT)):
        (tasks / name).parent.mkdir(parents=True, exist_ok=True)
        (tasks / f"{name}.yaml").write_text(text)
    (tasks / "gsm8k").mkdir()
    (tasks / "gsm8k/gsm8k.yaml").write_text("task: gsm8k\n")
    monkeypatch.setattr(local, "HARNESS", tmp_path / "bin" / "lm_eval")
    return tasks


def test_every_setting_is_one_the_server_takes() -> None:
    for setting in SETTINGS:
        options = {PREFIX + name: value for name, value in setting.options.items()}
        resolve(ServerOptions({}), parse_request_options(options))


def test_gsm8k_is_the_harness_s_own_with_local_files(harness_tasks: Path, tmp_path: Path) -> None:
    data, out = tmp_path / "data", tmp_path / "out"
    data.mkdir()
    out.mkdir()
    (data / "gsm8k_test.jsonl").write_text('{"question": "a"}\n{"question": "b"}\n')
    (data / "gsm8k_train_head.jsonl.gz").write_bytes(gzip.compress(b'{"question": "c"}\n'))
    task, problems = write_local_task("gsm8k", data, out)
    assert (task.name, task.shots, task.canvas, problems) == ("gsm8k_local", 4, 256, 2)
    config = json.loads((out / "gsm8k_local.yaml").read_text())
    assert config["include"] == str(harness_tasks / "gsm8k/gsm8k.yaml")
    files = config["dataset_kwargs"]["data_files"]
    assert Path(files["train"]).read_text() == '{"question": "c"}\n'
    assert Path(files["test"]).read_text().count("\n") == 2


@pytest.mark.parametrize("name", ["humaneval", "humaneval_instruct"])
def test_humaneval_leaves_out_what_the_hub_is_needed_for(harness_tasks: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "HumanEval.jsonl").write_text('{"prompt": "a"}\n')
    out = tmp_path / "out"
    out.mkdir()
    task, _ = write_local_task(name, tmp_path, out)
    assert (task.name, task.runs_code) == (f"{name}_local", True)
    text = (out / f"{name}_local.yaml").read_text()
    assert "!function humaneval_utils.pass_at_k" in text
    assert "!function utils." not in text
    assert "openai/openai_humaneval" not in text
    assert "include:" not in text
    assert text.count("doc_to_text:") == 1
    assert ("Solve: {{ prompt }}" in text) == (name == "humaneval_instruct")
    assert (out / "humaneval_utils.py").exists()


def test_missing_files_are_named(harness_tasks: Path, tmp_path: Path) -> None:
    with pytest.raises(MissingError, match="no gsm8k_test"):
        write_local_task("gsm8k", tmp_path, tmp_path)


def test_programs_are_judged_by_their_tests() -> None:
    tests = "def check(f):\n    assert f(2) == 4\ncheck(double)"
    answers = [["def double(x):\n    return 2 * x"], ["def double(x):\n    return x"], ["def double(x) return"]]
    assert humaneval_utils.pass_at_k([tests] * 3, answers, [1]) == {"pass@1": pytest.approx(1 / 3)}
    assert not humaneval_utils.passes("while True: pass", seconds=0.5)


def test_predictions_are_whole_programs() -> None:
    docs = [{"prompt": "def f():\n"}]
    assert humaneval_utils.build_predictions([["    return 1"]], docs) == [["def f():\n    return 1"]]
    assert humaneval_utils.build_predictions_instruct([["    return 1\n```\nDone."]], docs) == [
        ["def f():\n    return 1\n"]
    ]


def test_a_record_goes_on_where_it_was_interrupted(tmp_path: Path) -> None:
    path, about = tmp_path / "r.jsonl", {"model": "m", "limit": None}
    Record(path, about).add(score("gsm8k_local", "full"))
    with path.open("a") as sink:
        sink.write('{"about": {"model": "m", "li')  # the machine went down here
    again = Record(path, about)
    assert set(again.scores) == {("gsm8k_local", "full")}
    again.add(score("gsm8k_local", "d2cache"))
    assert set(Record(path, about).scores) == {("gsm8k_local", "full"), ("gsm8k_local", "d2cache")}
    assert Record(path, about).scores["gsm8k_local", "full"] == score("gsm8k_local", "full")


def test_scores_of_another_run_are_not_taken_over(tmp_path: Path) -> None:
    Record(tmp_path / "r.jsonl", {"limit": 2}).add(score("gsm8k_local", "full"))
    assert Record(tmp_path / "r.jsonl", {"limit": None}).scores == {}


@pytest.mark.parametrize("architecture", COLUMNS)
def test_figures_stand_in_the_family_s_column_of_the_page(architecture: str) -> None:
    before = PAGE.read_text()
    scores = [score("gsm8k_local", "d2cache", 79.0), score("humaneval_local", "full", 45.0), score("mmlu", "full")]
    after = filled(before, scores, COLUMNS[architecture])
    changed = [(a, b) for a, b in zip(before.split("\n"), after.split("\n"), strict=True) if a != b]
    assert [b.split("|")[COLUMNS[architecture]].strip() for _, b in changed] == ["7.50 / 79.0", "7.50 / 45.0"]
    assert changed[0][0].split("|")[2].strip() == "d2cache"
    assert changed[1][0].split("|")[1].strip().startswith("HumanEval")
    heading = next(line for line in before.split("\n") if line.startswith("| task | policy |"))
    assert heading.split("|")[COLUMNS[architecture]].strip() == "yours"
