"""lm-evaluation-harness: a few of the checkpoint's own problems, the same scores in every run."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import httpx
import pytest

from benchmarks.quality.tasks import write_tiny_tasks
from tests.clients.conftest import MODEL
from tests.e2e.server import Server

PROBLEMS = 9


@pytest.fixture(scope="module")
def evaluate(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The harness's function of that name, without network."""
    os.environ |= {
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(tmp_path_factory.mktemp("cache")),
        "OPENAI_API_KEY": "none",
    }
    from lm_eval import simple_evaluate

    return simple_evaluate


def chat_text(server: Server, question: str) -> str:
    """A question as the chat template has it, without the token that completions put before a prompt."""
    body = {"model": MODEL, "messages": [{"role": "user", "content": question}]}
    tokens = httpx.post(f"{server.url}/tokenize", json=body).json()["tokens"]
    start = httpx.post(f"{server.url}/tokenize", json={"model": MODEL, "prompt": ""}).json()["tokens"]
    body = {"model": MODEL, "tokens": tokens[len(start) :]}
    return httpx.post(f"{server.url}/detokenize", json=body).json()["prompt"]


@pytest.mark.parametrize("route", ["chat/completions", "completions"])
def test_scores_repeat(server: Server, evaluate: Any, tmp_path: Path, route: str) -> None:
    from lm_eval.tasks import TaskManager

    chat = route.startswith("chat")
    task = write_tiny_tasks(tmp_path, PROBLEMS, str if chat else lambda question: chat_text(server, question))
    runs = [
        evaluate(
            model="local-chat-completions" if chat else "local-completions",
            model_args={
                "model": MODEL,
                "base_url": f"{server.url}/v1/{route}",
                "num_concurrent": 8,
                "max_retries": 1,
                "tokenizer_backend": None,
                "tokenized_requests": False,
            },
            tasks=[task.name],
            task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
            apply_chat_template=chat,
            gen_kwargs={"temperature": 0},
            bootstrap_iters=0,
        )
        for _ in range(2)
    ]
    answers = [{n: [s["resps"] for s in samples] for n, samples in run["samples"].items()} for run in runs]
    assert sum(map(len, answers[0].values())) == PROBLEMS
    assert answers[0] == answers[1]
    scores = [run["groups"][task.name][task.metric] for run in runs]
    assert scores[0] == scores[1]
    assert scores[0] >= 1 / 3, "the checkpoint solves some of each kind"
