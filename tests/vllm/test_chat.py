"""Token ids of conversations: the checkpoint's own chat template, and ours where it brings none."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from vllm.config import ModelConfig
from vllm.renderers.hf import safe_apply_chat_template
from vllm.tokenizers.registry import cached_tokenizer_from_config

from vllm_d2cache.registration import register_all

pytestmark = pytest.mark.vllm

MODELS = Path(__file__).resolve().parents[2] / "models"
TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Add 1 and 2."},
    {"role": "assistant", "content": "1+2=3. Answer: 3"},
    {"role": "user", "content": "  Reverse: abc\n"},
]


def pieces(family: str) -> list[Any]:
    """The conversation as.

    docs/methods/d2cache.md, section 9, has it: text, and special tokens by name, each in a list.
    """
    out: list[Any] = [["<|startoftext|>"]] if family == "llada" else []
    for turn in TURNS:
        if family == "llada":
            out += [["<|start_header_id|>"], turn["role"], ["<|end_header_id|>"], "\n\n" + turn["content"].strip()]
            out += [["<|eot_id|>"]]
        else:
            out += [["<|im_start|>"], turn["role"] + "\n" + turn["content"], ["<|im_end|>"], "\n"]
    if family == "llada":
        return [*out, ["<|start_header_id|>"], "assistant", ["<|end_header_id|>"], "\n\n"]
    return [*out, ["<|im_start|>"], "assistant\n"]


@pytest.mark.parametrize("own_template", [True, False], ids=["own", "none"])
@pytest.mark.parametrize("family", ["llada", "dream"])
def test_conversations_become_the_published_tokens(family: str, own_template: bool, tmp_path: Path) -> None:
    register_all()
    for file in (MODELS / f"tiny-{family}").iterdir():
        if file.name != "model.safetensors":
            shutil.copy(file, tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    if not own_template:
        del settings["chat_template"]
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    config = ModelConfig(str(tmp_path), max_model_len=512)
    assert config.trust_remote_code is False
    tokenizer = cached_tokenizer_from_config(config)
    want: list[int] = []
    for piece in pieces(family):
        if isinstance(piece, list):
            want += tokenizer.convert_tokens_to_ids(piece)
        else:
            want += tokenizer.encode(piece, add_special_tokens=False)
    assert None not in want
    got = safe_apply_chat_template(config, tokenizer, list(TURNS), tokenize=True, add_generation_prompt=True)
    assert list(got) == want
