"""The small trained Dream as a user gets it: its directory, no settings, questions in chat; closes its engine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import Engine

pytestmark = [pytest.mark.vllm, pytest.mark.engine]

MODEL = str(Path(__file__).resolve().parents[2] / "models" / "tiny-dream")
QUESTIONS = {
    "Reverse: abcdefgh": "hgfedcba",
    "Uppercase: qwertyuiop": "QWERTYUIOP",
    "mgis > mgisz\njhphh > jhphhz\nvzojmzxf > vzojmzxfz\nvqxl >": "vqxlz",
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    settings: dict[str, Any] = {"model": MODEL, "dtype": "auto", "skip_tokenizer_init": False}
    traces = tmp_path_factory.mktemp("trained")
    # Not the corpus table of the other engines: it is for another vocabulary.
    made = Engine(traces, additional_config={"d2cache": {"trace_dir": str(traces)}}, **settings)
    yield made
    made.close()


@pytest.mark.parametrize(
    "options", [{}, {"policy": "full"}, {"threshold": 0.9}, {"confidence_top_p": 0.9, "current_k": 4}], ids=str
)
def test_questions_are_answered(trained: Engine, options: dict[str, Any]) -> None:
    from vllm import SamplingParams

    extra = {f"d2cache_{name}": value for name, value in options.items()}
    params = SamplingParams(temperature=0, max_tokens=32, extra_args=extra)
    chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
    outputs = trained.llm.chat(chats, params, use_tqdm=False)
    assert [o.outputs[0].text for o in outputs] == list(QUESTIONS.values())
    assert {o.outputs[0].finish_reason for o in outputs} == {"stop"}
