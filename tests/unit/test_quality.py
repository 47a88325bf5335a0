"""The evaluation over the server: what the harness is told, and what is counted from its results and the traces."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.quality.harness import Harness, HarnessError, Score, Setting, marks_of
from benchmarks.quality.report import accuracy_under_parallelism, cells, markdown, reference
from benchmarks.quality.tasks import PUBLISHED, Task, write_tiny_tasks
from tools.tiny_tasks import held_out


def harness(tmp_path: Path, chat: bool = True) -> Harness:
    return Harness("http://127.0.0.1:1", "tiny", tmp_path, chat)


def test_tiny_tasks_hold_every_problem_once_with_its_canvas(tmp_path: Path) -> None:
    write_tiny_tasks(tmp_path, 40, str)
    group = json.loads((tmp_path / "tiny.yaml").read_text())
    asked = []
    for name in group["task"]:
        config = json.loads((tmp_path / f"{name}.yaml").read_text())
        data = Path(config["dataset_kwargs"]["data_files"]["test"])
        for line in data.read_text().splitlines():
            record = json.loads(line)
            asked.append((record["prompt"], record["answer"], config["generation_kwargs"]["max_gen_toks"]))
    assert sorted(asked) == sorted((p.prompt, p.answer, p.canvas) for p in held_out(40))


def test_options_travel_as_vllm_xargs(tmp_path: Path) -> None:
    setting = Setting("x", "full", {"policy": "full", "threshold": 0.9})
    config = harness(tmp_path).config(PUBLISHED["gsm8k"], setting, tmp_path / "out")
    assert config["gen_kwargs"] == {
        "temperature": 0,
        "vllm_xargs": {"d2cache_policy": "full", "d2cache_threshold": 0.9},
        "max_gen_toks": 256,
    }
    assert config["num_fewshot"] == 4
    assert "confirm_run_unsafe_code" not in config


def test_endpoint_follows_chat(tmp_path: Path) -> None:
    task, setting = Task("t", "m,f"), Setting("x", "full", {})
    for chat, path in ((True, "/v1/chat/completions"), (False, "/v1/completions")):
        config = harness(tmp_path, chat).config(task, setting, tmp_path / "out")
        assert config["model_args"]["base_url"].endswith(path)
        assert config["apply_chat_template"] is chat


def write_trace(path: Path, prompt: int, canvas: int, steps: list[int | None], output: int) -> None:
    """A trace whose steps refresh that many positions (None: all) and commit one token each."""
    first = {"request_id": path.stem, "prompt_token_ids": [0] * prompt, "canvas_length": canvas, "options": {}}
    lines = [
        {"step": i, "refreshed": None if n is None else list(range(n)), "committed": [[i, 1]], "masked_left": 0}
        for i, n in enumerate(steps)
    ]
    last = {"output_token_ids": [1] * output, "finish_reason": "stop"}
    path.write_text("".join(json.dumps(record) + "\n" for record in [first, *lines, last]))


def test_costs_are_counted_from_the_traces(tmp_path: Path) -> None:
    write_trace(tmp_path / "a.jsonl", 10, 8, [None, 4, 6], 3)
    write_trace(tmp_path / "b.jsonl", 2, 4, [None, 2], 2)
    results = {"results": {"t": {"exact_match,f": 0.25, "exact_match_stderr,f": 0.1}}}
    task = Task("t", "exact_match,f")
    score = harness(tmp_path)._score(task, Setting("x", "d2cache", {}), results, 0.0)
    assert (score.requests, score.output_tokens, score.canvas_tokens, score.committed_tokens) == (2, 5, 12, 5)
    assert (score.steps, score.rows, score.full_rows) == (5, 18 + 4 + 6 + 6 + 2, 3 * 18 + 2 * 6)
    assert score.score == 25.0
    assert score.interval == pytest.approx(19.6)
    assert score.tokens_per_forward == 1.0
    assert cells(score)[2] == "25.0 ± 19.6"
    assert "| t | d2cache |" in markdown([score], "note")
    assert accuracy_under_parallelism([score]) == {("t", "d2cache"): pytest.approx(25.0)}


def test_missing_metric_is_named(tmp_path: Path) -> None:
    with pytest.raises(HarnessError, match="no exact_match,f among other,f"):
        results = {"results": {"t": {"other,f": 1.0}}}
        harness(tmp_path)._score(Task("t", "exact_match,f"), Setting("x", "full", {}), results, 0.0)


def test_group_scores_are_found(tmp_path: Path) -> None:
    write_trace(tmp_path / "a.jsonl", 1, 1, [None], 1)
    results = {"results": {"t_1": {}}, "groups": {"t": {"exact_match,f": 1.0, "exact_match_stderr,f": "N/A"}}}
    score = harness(tmp_path)._score(Task("t", "exact_match,f"), Setting("x", "full", {}), results, 0.0)
    assert (score.score, score.interval) == (100.0, 0.0)


def score(options: dict[str, object], marks: str, task: str = "t") -> Score:
    right = 100 * marks.count("1") / max(len(marks), 1)
    name = ", ".join(f"{k} {v}" for k, v in options.items())
    return Score(task, name, "c", options, len(marks), right, 0.0, 1, 1, 1, 1, 1, 1, 1.0, marks)


def test_settings_are_compared_with_full_recompute_that_decodes_alike() -> None:
    full, fast = score({"policy": "full"}, "1111"), score({"policy": "full", "threshold": 0.9}, "1110")
    cached, cached_fast = (
        score({"policy": "d2cache", "current_k": 8}, "1101"),
        score({"policy": "d2cache", "threshold": 0.9}, "0110"),
    )
    elsewhere = score({"policy": "full", "threshold": 0.9}, "0000", task="other")
    scores = [elsewhere, full, fast, cached, cached_fast]
    assert [reference(s, scores) for s in scores] == [None, None, full, full, fast]
    assert cells(full, scores)[3:6] == ["", "", ""]
    # One problem of four lost: (0 + 1) / 6 and (1 + 1) / 6 after a problem on either side.
    assert cells(cached_fast, scores)[3:6] == ["-25.0 [-71.7, +38.3]", "policy full, threshold 0.9", "1"]
    assert "-25.0 [-71.7, +38.3]" in markdown(scores, "note")


def test_where_nothing_decodes_alike_the_first_full_recompute_is_named() -> None:
    full, cached = score({"policy": "full", "window": 32}, "11"), score({"policy": "d2cache"}, "10")
    scores = [full, score({"policy": "full", "window": 16}, "11"), cached]
    assert [reference(s, scores) for s in scores] == [None, None, full]
    assert cells(cached, scores)[4] == "policy full, window 32"


def test_settings_without_marks_are_not_compared() -> None:
    full, cached = score({"policy": "full"}, ""), score({"policy": "d2cache"}, "")
    assert cells(cached, [full, cached])[3:6] == ["", "", ""]


def samples(path: Path, rows: list[tuple[int, str, float]]) -> Path:
    path.write_text("".join(json.dumps({"doc_id": i, "filter": f, "exact_match": v}) + "\n" for i, f, v in rows))
    return path


def test_marks_stand_in_one_order_whatever_the_files_have(tmp_path: Path) -> None:
    first = samples(
        tmp_path / "samples_tiny_16_2026-01-02T03-04-05.jsonl", [(1, "f", 0.0), (0, "f", 1.0), (0, "g", 0.0)]
    )
    second = samples(tmp_path / "samples_tiny_32_2026-01-02T03-04-09.jsonl", [(0, "f", 1.0), (1, "f", 1.0)])
    assert marks_of([second, first], "exact_match,f") == marks_of([first, second], "exact_match,f") == "1011"
    assert marks_of([first], "other,f") == ""


def test_marks_are_only_of_right_and_wrong(tmp_path: Path) -> None:
    path = samples(tmp_path / "samples_t_2026-01-02T03-04-05.jsonl", [(0, "f", 0.5), (1, "f", 1.0)])
    assert marks_of([path], "exact_match,f") == ""
