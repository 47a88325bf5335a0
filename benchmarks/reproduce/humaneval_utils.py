"""Runs what a model wrote for HumanEval against the problem's tests, each in a process of its own with a time limit.

Stands in for the harness's own functions of these names, which fetch their code from the hub. Standard library only:
the harness imports it from a directory of tasks, in an environment without the rest of this repository.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from typing import Any

SECONDS = 10.0


def passes(program: str, seconds: float = SECONDS) -> bool:
    """Whether a program ends by itself, without an error, in time."""
    with tempfile.TemporaryDirectory() as scratch:
        try:
            done = subprocess.run(
                [sys.executable, "-I", "-c", program],
                cwd=scratch,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                timeout=seconds,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return False
    return done.returncode == 0


def pass_at_k(references: list[str], predictions: list[list[str]], k: list[int] | None = None) -> dict[str, float]:
    """The share of problems whose one answer passes its tests."""
    if k not in ([1], None) or any(len(answers) != 1 for answers in predictions):
        raise ValueError(f"one answer a problem and k = [1], got k = {k}")
    right = [passes(f"{answers[0]}\n{tests}") for answers, tests in zip(predictions, references, strict=True)]
    return {"pass@1": sum(right) / len(right)}


def build_predictions(resps: list[list[str]], docs: list[dict[str, Any]]) -> list[list[str]]:
    """The function's head, then what the model wrote."""
    return [[doc["prompt"] + text for text in texts] for texts, doc in zip(resps, docs, strict=True)]


def build_predictions_instruct(resps: list[list[str]], docs: list[dict[str, Any]]) -> list[list[str]]:
    """The same of a chat's answer: up to the end of its block of code."""
    return build_predictions([[text.partition("```")[0] for text in texts] for texts in resps], docs)
