"""Damaged weights are found wherever they are, whatever vLLM's layers do with their parameters on this CPU."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.reference.int8 import write_int8
from tests.reference.oracle import ORACLE

pytestmark = pytest.mark.vllm

NAMES = {
    "llada": [
        "transformer.wte.weight",
        "blocks.1.q_proj.weight",
        "blocks.3.ff_out.weight",
        "blocks.0.attn_norm.weight",
    ],
    "dream": ["layers.2.self_attn.k_proj.bias", "layers.3.mlp.gate_proj.weight", "lm_head.weight"],
}
PLACES = [(family, place) for family, places in NAMES.items() for place in places]


def damage(file: Path, place: str, value: float = torch.nan, dtype: torch.dtype | None = None) -> tuple[str, int]:
    """Put one bad number into the only tensor whose name ends so; its whole name, and how many tensors there are."""
    tensors = {name: t if dtype is None else t.to(dtype) for name, t in load_file(file).items()}
    (victim,) = [name for name in tensors if name.endswith(place)]
    tensors[victim].view(-1)[3:4].fill_(value)
    save_file(tensors, file, metadata={"format": "pt"})
    return victim, len(tensors)


def said(victim: str, count: int) -> str:
    return rf"damaged: 1 of {count} tensors hold NaN or infinity, e\.g\. {re.escape(victim)};"


@pytest.mark.parametrize(("family", "place"), PLACES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_bad_number(
    family: str, place: str, dtype: torch.dtype, linear_layers: str, tmp_path: Path, load: Any
) -> None:
    model = Path(shutil.copytree(ORACLE / family, tmp_path / "model"))
    victim, count = damage(model / "model.safetensors", place, dtype=dtype)
    with pytest.raises(ValueError, match=said(victim, count)):
        load(model)


@pytest.mark.parametrize("place", ["blocks.2.up_proj.weight_scale", "blocks.0.ff_norm.weight"])
def test_in_layers_that_are_quantised(place: str, tmp_path: Path, load: Any) -> None:
    """vLLM's layers make their own form of these on any CPU."""
    model = write_int8(ORACLE / "llada", tmp_path / "model")
    load(model)
    victim, count = damage(model / "model.safetensors", place, torch.inf)
    with pytest.raises(ValueError, match=said(victim, count)):
        load(model)


def test_a_number_that_the_dtype_cannot_hold(tmp_path: Path, load: Any) -> None:
    model = Path(shutil.copytree(ORACLE / "llada", tmp_path / "model"))
    victim, _ = damage(model / "model.safetensors", "blocks.1.q_proj.weight", 1e5)
    load(model, dtype="bfloat16")
    with pytest.raises(ValueError, match=rf"--dtype float16 cannot hold .* {re.escape(victim)}"):
        load(model, dtype="float16")


def test_a_buffer_that_follows_from_the_configuration_is_not_looked_at(tmp_path: Path, load: Any) -> None:
    model = Path(shutil.copytree(ORACLE / "dream", tmp_path / "model"))
    tensors = load_file(model / "model.safetensors")
    buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.full((8,), torch.nan)}
    save_file({**tensors, **buffer}, model / "model.safetensors", metadata={"format": "pt"})
    assert len(load(model).numbers) == sum(t.numel() for t in tensors.values())
