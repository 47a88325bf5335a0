"""Adapters name modules as their checkpoint does: vLLM must find ours by these names."""

from __future__ import annotations

from typing import Any

import pytest
from vllm.lora.utils import parse_fine_tuned_lora_name
from vllm.model_executor.models import supports_lora

from tests.reference.oracle import ORACLE

pytestmark = pytest.mark.vllm

# The checkpoint's name of a module -> ours, and where it is one of several that are joined here, which.
MODULES = {
    "llada": {
        "model.transformer.blocks.3.q_proj": ("layers.3.self_attn.qkv_proj", "q_proj"),
        "model.transformer.blocks.3.k_proj": ("layers.3.self_attn.qkv_proj", "k_proj"),
        "model.transformer.blocks.3.v_proj": ("layers.3.self_attn.qkv_proj", "v_proj"),
        "model.transformer.blocks.3.attn_out": ("layers.3.self_attn.o_proj", None),
        "model.transformer.blocks.3.ff_proj": ("layers.3.mlp.gate_up_proj", "ff_proj"),
        "model.transformer.blocks.3.up_proj": ("layers.3.mlp.gate_up_proj", "up_proj"),
        "model.transformer.blocks.3.ff_out": ("layers.3.mlp.down_proj", None),
    },
    "dream": {
        "model.layers.2.self_attn.q_proj": ("layers.2.self_attn.qkv_proj", "q_proj"),
        "model.layers.2.self_attn.v_proj": ("layers.2.self_attn.qkv_proj", "v_proj"),
        "model.layers.2.self_attn.o_proj": ("layers.2.self_attn.o_proj", None),
        "model.layers.2.mlp.gate_proj": ("layers.2.mlp.gate_up_proj", "gate_proj"),
        "model.layers.2.mlp.up_proj": ("layers.2.mlp.gate_up_proj", "up_proj"),
        "model.layers.2.mlp.down_proj": ("layers.2.mlp.down_proj", None),
    },
}


@pytest.mark.parametrize("family", MODULES)
def test_every_module_of_an_adapter_is_found(family: str, load: Any) -> None:
    model = load(ORACLE / family).model
    assert supports_lora(model)
    mapper = model.hf_to_vllm_mapper.get_rename_mapper()
    ours = dict(model.named_modules())
    for theirs, (module, part) in MODULES[family].items():
        for letter in "AB":
            name, is_a = parse_fine_tuned_lora_name(f"base_model.model.{theirs}.lora_{letter}.weight", mapper)
            assert is_a == (letter == "A")
            parent, _, last = module.rpartition(".")
            assert name == (module if part is None else f"{parent}.{part}")
        assert module in ours
        assert part is None or part in model.packed_modules_mapping[last]
