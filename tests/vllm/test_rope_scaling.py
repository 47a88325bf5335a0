"""Rotations for longer texts in the layers that serve, against transformers' own and the formula."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from vllm.engine.arg_utils import EngineArgs

from tests.reference.oracle import ORACLE
from vllm_d2cache.registration import register_all

pytestmark = pytest.mark.vllm

WIDTH, HEADS = 64, 4
POSITIONS = {"llada": "max_sequence_length", "dream": "max_position_embeddings"}


def checkpoint(directory: Path, family: str, entry: dict[str, Any], trained: int) -> Path:
    """The traces' checkpoint, trained on so many positions, whose config.json has this ``rope_scaling``."""
    model = Path(shutil.copytree(ORACLE / family, directory / "model"))
    content = json.loads((model / "config.json").read_text())
    content |= {"rope_scaling": entry, POSITIONS[family]: trained}
    (model / "config.json").write_text(json.dumps(content))
    return model


def frequencies(entry: dict[str, Any], theta: float, head: int, trained: int) -> tuple[torch.Tensor, float]:
    """Angles per position [head / 2] and the attention factor."""
    if entry["rope_type"] == "ntk":  # https://kexue.fm/archives/9706, which transformers does not have
        factor = entry["factor"]
        plain = (theta * factor) ** -(torch.arange(0, head, 2) / head)
        return plain / factor ** (2 / head), 1.0
    parameters = {"original_max_position_embeddings": trained, **entry, "rope_theta": theta}
    config = SimpleNamespace(
        rope_parameters=parameters,
        head_dim=head,
        hidden_size=WIDTH,
        num_attention_heads=HEADS,
        max_position_embeddings=int(trained * entry["factor"]),
        standardize_rope_params=lambda: None,
    )
    return ROPE_INIT_FUNCTIONS[entry["rope_type"]](config, torch.device("cpu"))


@pytest.mark.parametrize("family", POSITIONS)
@pytest.mark.parametrize(
    "entry",
    [
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "ntk", "factor": 4.0},
        {"rope_type": "yarn", "factor": 4.0},
        {"rope_type": "yarn", "factor": 8.0, "beta_fast": 20.0, "beta_slow": 2.0, "attention_factor": 1.25},
    ],
    ids=lambda e: f"{e['rope_type']} {e['factor']:g}",
)
def test_the_layers_rotate_as_config_json_asks(family: str, entry: dict[str, Any], tmp_path: Path, load: Any) -> None:
    trained = 128
    loaded = load(checkpoint(tmp_path, family, entry, trained), max_model_len=None, dtype="float32")
    longest = int(trained * entry["factor"])
    assert loaded.config.model_config.max_model_len == longest
    rotary = loaded.model.layers[0].self_attn.rotary_emb
    theta = loaded.config.model_config.hf_config.rope_theta
    head = loaded.model.shape.head_size
    inverse, attention = frequencies(entry, theta, head, trained)
    angles = torch.arange(longest).float()[:, None] * inverse.float()
    want = torch.cat([angles.cos(), angles.sin()], -1) * attention
    assert rotary.cos_sin_cache.shape == (longest, head)
    torch.testing.assert_close(rotary.cos_sin_cache.float(), want, rtol=0, atol=2e-4)
    query = torch.randn(1, HEADS * head)
    turned, _ = rotary(torch.tensor([longest - 1]), query.clone(), torch.randn(1, HEADS * head))
    cos, sin = want[-1].chunk(2)
    a, b = query.view(HEADS, head).chunk(2, -1)
    both = torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
    torch.testing.assert_close(turned.view(HEADS, head), both, rtol=0, atol=1e-3)


def test_a_longer_text_than_the_scaling_allows_is_refused(tmp_path: Path) -> None:
    register_all()
    model = checkpoint(tmp_path, "llada", {"rope_type": "linear", "factor": 2.0}, 128)
    assert EngineArgs(str(model), skip_tokenizer_init=True).create_engine_config().model_config.max_model_len == 256
    with pytest.raises(ValueError, match="max_model_len"):
        EngineArgs(str(model), skip_tokenizer_init=True, max_model_len=257).create_engine_config()
