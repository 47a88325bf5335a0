"""What config.json may say of rotations for longer texts (the layers: tests/vllm/test_rope_scaling.py)."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from tests.unit.models.test_model_configs import DREAM
from vllm_d2cache.models import rope
from vllm_d2cache.models.configs import DreamConfig, LLaDAConfig

LLADA = {"architectures": ["LLaDAModelLM"], "model_type": "llada", "max_sequence_length": 4096}
TRAINED = {LLaDAConfig: 4096, DreamConfig: DREAM["max_position_embeddings"]}
FILES: list[tuple[type[Any], dict[str, Any]]] = [(LLaDAConfig, LLADA), (DreamConfig, DREAM)]


@pytest.mark.parametrize(("cls", "file"), FILES)
@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("word", ["type", "rope_type"])
@pytest.mark.parametrize("kind", rope.KINDS)
def test_all_spellings_ask_for_the_same(cls: Any, file: dict[str, Any], key: str, word: str, kind: str) -> None:
    config = cls.from_dict({**file, key: {word: kind, "factor": 4, "rope_theta": 77.0}})
    assert config.unsupported() == []
    shape = config.shape()
    assert shape.rope_scaling == rope.RopeScaling(kind, 4.0, TRAINED[cls])
    assert (shape.rope_theta, shape.longest) == (77.0, 4 * TRAINED[cls])
    assert config.scaled_positions() == 4 * TRAINED[cls]


@pytest.mark.parametrize(("cls", "file"), FILES)
def test_a_plain_file_has_no_scaling(cls: Any, file: dict[str, Any]) -> None:
    config = cls.from_dict(file)
    assert config.shape().rope_scaling is None
    assert config.shape().longest == TRAINED[cls]
    assert config.scaled_positions() is None


def test_yarn_counts_from_the_original_positions() -> None:
    entry = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768, "beta_fast": 16}
    scaling = DreamConfig.from_dict({**DREAM, "rope_parameters": entry}).shape().rope_scaling
    assert scaling.longest == 131072
    assert scaling.for_vllm() == (
        32768,
        {"rope_type": "yarn", "factor": 4.0, "beta_fast": 16, "original_max_position_embeddings": 32768},
    )


def test_only_ntk_is_told_the_longest_text() -> None:
    """vLLM's layer of that kind prepares as many positions as it is told, the others multiply by the factor."""
    for kind, told in {"linear": 4096, "yarn": 4096, "ntk": 16384}.items():
        assert rope.read({"type": kind, "factor": 4}, 4096).for_vllm()[0] == told


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"type": "linear"}, "rope_parameters.factor=None (must be a number of at least 1)"),
        ({"type": "linear", "factor": "4"}, "rope_parameters.factor='4' (must be a number above 0)"),
        ({"type": "ntk", "factor": True}, "rope_parameters.factor=True (must be a number above 0)"),
        ({"type": "yarn", "factor": 0.5}, "rope_parameters.factor=0.5 (must be a number of at least 1)"),
        ({"type": "ntk", "factor": 10**400}, "rope_parameters.factor=1000"),
        ({"type": "ntk", "factor": float("inf")}, "rope_parameters.factor=inf (must be a number above 0)"),
        ({"type": "linear", "factor": 5000}, "rope_parameters.factor=5000 (of 4096 positions: more than 16777216)"),
        (
            {"type": "linear", "factor": 2, "beta_fast": 3},
            "rope_parameters.beta_fast=3 (no setting of linear; it has",
        ),
        (
            {"type": "yarn", "factor": 2, "beta_fast": -1},
            "rope_parameters.beta_fast=-1 (must be a number from 0.001 to",
        ),
        *(
            (
                {"type": "yarn", "factor": 2, key: value},
                f"rope_parameters.{key}={value!r} (must be a number from 0.001 to",
            )
            for key in ("attention_factor", "mscale", "mscale_all_dim", "beta_fast", "beta_slow")
            for value in (1e308, 1e-308, 0, True, "1", 10**400)
        ),
        ({"type": "yarn", "factor": 2, "rope_theta": 1}, "rope_theta=1 (must be above 1 with yarn"),
        (
            {"type": "yarn", "factor": 2, "beta_fast": 0.5},
            "rope_parameters.beta_fast=0.5 (must be at least beta_slow, 1)",
        ),
        (
            {"type": "yarn", "factor": 2, "beta_slow": 33},
            "rope_parameters.beta_fast=32 (must be at least beta_slow, 33)",
        ),
        ({"type": "yarn", "factor": 2, "truncate": 1}, "rope_parameters.truncate=1 (must be true or false)"),
        (
            {"type": "yarn", "factor": 2, "original_max_position_embeddings": 2.5},
            "rope_parameters.original_max_position_embeddings=2.5 (must be a whole number",
        ),
        (
            {"type": "linear", "rope_type": "yarn", "factor": 2},
            "rope_parameters.type='linear' (but rope_type='yarn'; they are the same setting)",
        ),
    ],
)
def test_what_makes_no_sense_is_refused_by_its_key(entry: dict[str, Any], said: str) -> None:
    reason = LLaDAConfig.from_dict({**LLADA, "rope_scaling": entry}).unsupported()[0]
    assert reason.startswith(said)


@pytest.mark.parametrize("theta", [1.0000001, 2, 10000.0, 1e30])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 0.707},
        {"beta_fast": 1e6, "beta_slow": 0.001, "attention_factor": 1000},
        {"beta_fast": 1, "beta_slow": 1, "attention_factor": 0.001, "truncate": False},
        {"mscale": 1000, "mscale_all_dim": 0.001},
    ],
)
def test_what_is_accepted_is_finite(theta: float, settings: dict[str, Any]) -> None:
    """The formulas of vLLM's layer, at both ends of the range."""
    entry = {"rope_type": "yarn", "factor": 4, "rope_theta": theta, **settings}
    assert LLaDAConfig.from_dict({**LLADA, "rope_parameters": entry}).unsupported() == []
    for beta in (settings.get("beta_fast", 32), settings.get("beta_slow", 1)):
        assert math.isfinite(128 * math.log(4096 / (beta * 2 * math.pi)) / (2 * math.log(theta)))
    scale = [0.1 * settings.get(key, 1) * math.log(4) + 1 for key in ("mscale", "mscale_all_dim")]
    assert 0 < settings.get("attention_factor", scale[0] / scale[1]) < 65504


def test_a_later_word_counts() -> None:
    """--hf-overrides come after the file was read."""
    config = LLaDAConfig.from_dict({**LLADA, "rope_scaling": {"type": "linear", "factor": 4}})
    config.update({"rope_parameters": {"rope_type": "yarn", "factor": 2}})
    config.check()
    assert config.shape().rope_scaling == rope.RopeScaling("yarn", 2.0, 4096)
    config.update({"rope_parameters": {"rope_type": "default", "rope_theta": 9.0}})
    config.check()
    assert (config.shape().rope_scaling, config.shape().rope_theta) == (None, 9.0)


@pytest.mark.parametrize(("cls", "file"), FILES)
def test_a_configuration_that_was_written_says_the_same(cls: Any, file: dict[str, Any]) -> None:
    config = cls.from_dict({**file, "rope_scaling": {"type": "linear", "factor": 4, "rope_theta": 5.0}})
    again = cls.from_dict(json.loads(config.to_json_string()))
    assert again.shape() == config.shape()
