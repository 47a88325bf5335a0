"""The chat templates of families whose checkpoints may bring none, as text. tests/vllm/test_chat.py has the tokens."""

from __future__ import annotations

import json
from typing import Any

import pytest
from jinja2 import Environment

from vllm_d2cache.models.families import FAMILIES

TURNS = [{"role": "user", "content": "Add 1 and 2."}, {"role": "assistant", "content": "3"}]
SYSTEM = [{"role": "system", "content": "Be brief."}]


class RefusedError(Exception):
    """What a template raises."""


def refuse(message: str) -> None:
    raise RefusedError(message)


def render(architecture: str, messages: list[dict[str, str]], **variables: Any) -> str:
    path = FAMILIES[architecture].chat_template
    assert path is not None
    environment = Environment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = refuse
    return environment.from_string(path.read_text()).render(messages=messages, bos_token="<bos>", **variables)


def test_llada2() -> None:
    text = render("LLaDA2MoeModelLM", [*SYSTEM, *TURNS, TURNS[0]], add_generation_prompt=True)
    assert text == (
        "<role>SYSTEM</role>Be brief.\ndetailed thinking off<|role_end|><role>HUMAN</role>Add 1 and 2.<|role_end|>"
        "<role>ASSISTANT</role>3<|role_end|><role>HUMAN</role>Add 1 and 2.<|role_end|><role>ASSISTANT</role>"
    )
    text = render("LLaDA2MoeModelLM", TURNS[:1], add_generation_prompt=False)
    assert text == "<role>SYSTEM</role>detailed thinking off<|role_end|><role>HUMAN</role>Add 1 and 2.<|role_end|>"
    for messages in ([*TURNS, *SYSTEM], [{"role": "tool", "content": "x"}]):
        with pytest.raises(RefusedError, match="this chat template has user and assistant"):
            render("LLaDA2MoeModelLM", messages)


@pytest.mark.parametrize("architecture", ["SDARForCausalLM", "SDARMoeForCausalLM", "Fast_dLLM_QwenForCausalLM"])
def test_chatml(architecture: str) -> None:
    text = render(architecture, [*SYSTEM, TURNS[0]], add_generation_prompt=True)
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nAdd 1 and 2.<|im_end|>\n<|im_start|>assistant\n"
    )


def test_no_template_trips_over_content_in_json() -> None:
    """Braces are text."""
    content = json.dumps({"a": ["{{ x }}", "{% if %}"]})
    for architecture, family in FAMILIES.items():
        if family.chat_template is not None:
            assert content in render(architecture, [{"role": "user", "content": content}], add_generation_prompt=True)
