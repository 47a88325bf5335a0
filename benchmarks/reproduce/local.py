"""The published tasks from files on this machine, for where the hub cannot be reached.

A directory holds gsm8k_test.jsonl and gsm8k_train*.jsonl (grade-school-math's own lines: question, answer) and
HumanEval.jsonl or HumanEval.jsonl.gz (human-eval's own). Prompts, examples and answer extraction are the harness's;
only HumanEval's answers are run by humaneval_utils.py, as the harness would fetch the code that does so from the hub.
"""

from __future__ import annotations

import gzip
import json
import shutil
from dataclasses import replace
from pathlib import Path

from benchmarks.quality.harness import HARNESS
from benchmarks.quality.tasks import PUBLISHED, Task

SCORER = Path(__file__).with_name("humaneval_utils.py")
LOCAL = ("gsm8k", "humaneval", "humaneval_instruct")


class MissingError(Exception):
    """A file is not where it should be. The message names it."""


def _one(directory: Path, pattern: str) -> Path:
    found = sorted(directory.glob(pattern))
    if not found:
        raise MissingError(f"no {pattern} in {directory}")
    return found[0]


def _unpacked(source: Path, directory: Path) -> Path:
    """A plain copy of a file that may be packed."""
    copy = directory / source.name.removesuffix(".gz")
    copy.write_bytes(gzip.decompress(source.read_bytes()) if source.suffix == ".gz" else source.read_bytes())
    return copy


def _harness_task(name: str) -> Path:
    """The file in which the harness describes a task."""
    packages = HARNESS.absolute().parent.parent / "lib"
    return _one(packages, f"python*/site-packages/lm_eval/tasks/{name.partition('_')[0]}/{name}.yaml")


def write_local_task(name: str, data: Path, directory: Path) -> tuple[Task, int]:
    """One of `LOCAL`, described for the harness in `directory`; also says how many problems it has.

    Raises:
        MissingError: a file of problems is missing.
    """
    changes: dict[str, object] = {"task": f"{name}_local", "dataset_path": "json", "dataset_name": None}
    if name == "gsm8k":
        files = {"test": _one(data, "gsm8k_test.jsonl*"), "train": _one(data, "gsm8k_train*.jsonl*")}
        changes["include"] = str(_harness_task(name))
    else:
        files = {"test": _one(data, "HumanEval.jsonl*")}
        shutil.copy(SCORER, directory / SCORER.name)
    local = {split: _unpacked(path, directory) for split, path in files.items()}
    changes["dataset_kwargs"] = {"data_files": {split: str(path.resolve()) for split, path in local.items()}}
    path = directory / f"{name}_local.yaml"
    if name == "gsm8k":
        path.write_text(json.dumps(changes))  # JSON is YAML
    else:
        path.write_text(_without_hub(_harness_task(name), name, changes))
    problems = sum(bool(line.strip()) for line in local["test"].read_text().splitlines())
    return replace(PUBLISHED[name], name=f"{name}_local"), problems


def _without_hub(source: Path, name: str, changes: dict[str, object]) -> str:
    """HumanEval's description with what it includes in place, and its functions those of `SCORER`."""
    texts = [source.with_name("humaneval.yaml").read_text()]
    if name != "humaneval":
        texts.append(source.read_text())
    kept: dict[str, list[str]] = {}
    for text in texts:
        key = ""
        for line in text.splitlines():
            if line and not line[0].isspace() and not line.startswith("-"):
                key = line.partition(":")[0]
                kept[key] = []
            if key:
                kept[key].append(line)
    for key in ("include", *changes):
        kept.pop(key, None)
    body = "\n".join(line for lines in kept.values() for line in lines)
    head = "\n".join(f"{key}: {json.dumps(value)}" for key, value in changes.items())
    return f"{head}\n{body}\n".replace("!function utils.", f"!function {SCORER.stem}.")
