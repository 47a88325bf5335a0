"""Layers of quantised checkpoints as vLLM loads them, against the same arithmetic in PyTorch; no engine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.reference.int4 import CONFIGS, stands_for, write_int4
from tests.reference.oracle import ORACLE
from tests.vllm.test_start_and_doctor import problems

pytestmark = pytest.mark.vllm

# Our module -> the checkpoint's modules that it is made of, in order.
PARTS = {
    "llada": {
        "self_attn.qkv_proj": ("q_proj", "k_proj", "v_proj"),
        "self_attn.o_proj": ("attn_out",),
        "mlp.gate_up_proj": ("ff_proj", "up_proj"),
        "mlp.down_proj": ("ff_out",),
    },
    "dream": {
        "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "self_attn.o_proj": ("self_attn.o_proj",),
        "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
        "mlp.down_proj": ("mlp.down_proj",),
    },
}
PREFIX = {"llada": "model.transformer.blocks", "dream": "model.layers"}


@pytest.mark.parametrize("family", PARTS)
@pytest.mark.parametrize("layout", CONFIGS)
def test_four_bits(layout: str, family: str, tmp_path: Path, load: Any) -> None:
    checkpoint = write_int4(ORACLE / family, tmp_path / "model", layout)
    assert problems(checkpoint) == []
    model = load(checkpoint, dtype="bfloat16").model
    plain = load_file(ORACLE / family / "model.safetensors")
    generator = torch.Generator().manual_seed(3)
    for number, layer in enumerate(model.layers):
        for name, parts in PARTS[family].items():
            module = layer.get_submodule(name)
            names = [f"{PREFIX[family]}.{number}.{part}" for part in parts]
            weight = torch.cat([stands_for(plain[f"{n}.weight"]) for n in names])
            x = torch.randn(9, weight.shape[1], generator=generator).bfloat16()
            want = x.float() @ weight.T
            if f"{names[0]}.bias" in plain:
                want += torch.cat([plain[f"{n}.bias"].float() for n in names])
            got, _ = module(x)
            # Products of bf16 numbers, added up in fp32, and one rounding of the sum.
            torch.testing.assert_close(got.float(), want, rtol=2e-2, atol=2e-2 * float(want.std()))


def test_a_file_of_its_own_says_how_older_checkpoints_are_quantised(tmp_path: Path, load: Any) -> None:
    checkpoint = write_int4(ORACLE / "dream", tmp_path / "model", "gptq")
    config = json.loads((checkpoint / "config.json").read_text())
    settings = config.pop("quantization_config")
    del settings["quant_method"]
    (checkpoint / "config.json").write_text(json.dumps(config))
    (checkpoint / "quantize_config.json").write_text(json.dumps(settings))
    assert problems(checkpoint) == []
    loaded = load(checkpoint, dtype="bfloat16")
    assert "gptq" in loaded.config.model_config.quantization
    assert loaded.config.model_config.hf_config.quantization_config["bits"] == 4


@pytest.mark.parametrize("family", PARTS)
def test_a_layer_that_is_missing_is_named(family: str, tmp_path: Path, load: Any) -> None:
    checkpoint = write_int4(ORACLE / family, tmp_path / "model", "compressed-tensors")
    tensors = load_file(checkpoint / "model.safetensors")
    gone = f"{PREFIX[family]}.2.{PARTS[family]['mlp.gate_up_proj'][1]}"
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith(f"{gone}.")}
    assert len(kept) == len(tensors) - 3
    save_file(kept, checkpoint / "model.safetensors", {"format": "pt"})
    said = f"the checkpoint lacks {gone}.weight in any form"
    assert problems(checkpoint) == [said]
    with pytest.raises(ValueError, match=said):
        load(checkpoint, dtype="bfloat16")
