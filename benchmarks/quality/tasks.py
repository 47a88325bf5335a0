"""What is asked: the published tasks with their settings, and the tiny checkpoints' own problems as harness tasks."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tools.tiny_tasks import held_out


@dataclass(frozen=True)
class Task:
    """One task of lm-evaluation-harness as it is run here.

    Attributes:
        name: the harness's name of it.
        metric: "metric,filter" of the score in the harness's results.
        shots: solved examples in the prompt; None = as the task says.
        canvas: max_tokens of every request; None = as the task says.
        runs_code: scoring executes what the model wrote.
    """

    name: str
    metric: str
    shots: int | None = None
    canvas: int | None = None
    runs_code: bool = False


# Few-shot counts and response lengths of the d2Cache paper's main table (docs/methods/d2cache.md, sections 10 and 11).
PUBLISHED = {
    "gsm8k": Task("gsm8k", "exact_match,flexible-extract", 4, 256),
    "humaneval": Task("humaneval", "pass@1,create_test", 0, 512, runs_code=True),
    "humaneval_instruct": Task("humaneval_instruct", "pass@1,create_test", 0, 512, runs_code=True),
    "mbpp": Task("mbpp", "pass_at_1,none", 3, 512, runs_code=True),
    "minerva_math": Task("minerva_math500", "math_verify,none", 4, 256),
    "gpqa": Task("gpqa_main_generative_n_shot", "exact_match,flexible-extract", 0, 256),
    "mmlu_pro": Task("mmlu_pro", "exact_match,custom-extract", 5, 256),
}
TINY_METRIC = "exact_match,stripped"


def write_tiny_tasks(directory: Path, problems: int, render: Callable[[str], str]) -> Task:
    """The held-out problems of tools/tiny_tasks.py as a group of harness tasks, one for each canvas length.

    Args:
        directory: receives the task files and the data; hand it to the harness as ``--include_path``.
        problems: how many, all kinds in turn.
        render: a user's message as what is sent: itself for chat, the whole rendered chat for completions.
    """
    by_canvas: dict[int, list[str]] = defaultdict(list)
    for problem in held_out(problems):
        by_canvas[problem.canvas].append(json.dumps({"prompt": render(problem.prompt), "answer": problem.answer}))
    names = []
    for canvas, lines in sorted(by_canvas.items()):
        name, data = f"tiny_{canvas}", directory / f"tiny_{canvas}.jsonl"
        data.write_text("\n".join(lines) + "\n")
        config = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(data.resolve())}},
            "test_split": "test",
            "output_type": "generate_until",
            "doc_to_text": "{{prompt}}",
            "doc_to_target": "{{answer}}",
            "generation_kwargs": {"until": [], "max_gen_toks": canvas, "do_sample": False},
            "filter_list": [
                {"name": "stripped", "filter": [{"function": "remove_whitespace"}, {"function": "take_first"}]}
            ],
            "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
            "metadata": {"version": 1.0},
        }
        # JSON is YAML.
        (directory / f"{name}.yaml").write_text(json.dumps(config))
        names.append(name)
    group = {
        "group": "tiny",
        "task": names,
        "aggregate_metric_list": [{"metric": "exact_match", "filter_list": ["stripped"], "weight_by_size": True}],
        "metadata": {"version": 1.0},
    }
    (directory / "tiny.yaml").write_text(json.dumps(group))
    return Task("tiny", TINY_METRIC)
