"""The table of families against the classes it names."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from vllm_d2cache.models.configs import DiffusionLMConfig
from vllm_d2cache.models.families import FAMILIES

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize("architecture", FAMILIES)
def test_what_the_table_names_is_there(architecture: str) -> None:
    family = FAMILIES[architecture]
    config = family.config_class()
    assert issubclass(config, DiffusionLMConfig)
    assert config.model_type == family.model_type
    module, _, name = family.model.partition(":")
    source = (ROOT / module.replace(".", "/")).with_suffix(".py").read_text()
    assert name in [node.name for node in ast.parse(source).body if isinstance(node, ast.ClassDef)]
    assert family.chat_template is None or family.chat_template.is_file()
    tokenizer = family.tokenizer_class()
    assert tokenizer is None or issubclass(tokenizer, PreTrainedTokenizerBase)


def test_no_two_families_have_one_model_type() -> None:
    assert len({family.model_type for family in FAMILIES.values()}) == len(FAMILIES)


@pytest.mark.parametrize("architecture", FAMILIES)
def test_every_model_type_leads_to_the_architectures_class(architecture: str) -> None:
    family = FAMILIES[architecture]
    registered = {f.model_type: f.config_class() for f in FAMILIES.values()}
    fields = {name: value for name, value in family.config_class()().to_dict().items() if name != "architectures"}
    for model_type in (family.model_type, *family.other_types):
        cls = registered.get(model_type) or family.config_class().under(model_type)
        assert cls.model_type == model_type
        config = cls.from_dict({**fields, "architectures": [architecture], "model_type": model_type})
        assert isinstance(config, family.config_class())
        assert config.shape() == family.config_class()().shape()


def test_the_architecture_decides_whatever_the_model_type() -> None:
    sdar = FAMILIES["SDARForCausalLM"].config_class()
    moe = FAMILIES["SDARMoeForCausalLM"].config_class()
    fields = {name: value for name, value in moe().to_dict().items() if name != "architectures"}
    assert type(sdar.from_dict({**fields, "architectures": ["SDARMoeForCausalLM"]})) is moe
    assert type(moe.from_dict({**fields, "architectures": ["SDARForCausalLM"]})) is sdar


def test_reading_the_table_loads_nothing_large() -> None:
    code = (
        "import sys, vllm_d2cache.registration\n"
        "print([m for m in ('torch', 'vllm', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"
