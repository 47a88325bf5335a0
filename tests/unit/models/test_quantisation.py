"""Which quantised weights are refused, which are let through with a line in the log, and which without."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.unit.models.test_model_configs import DREAM
from vllm_d2cache.doctor.model_directory import check_model
from vllm_d2cache.models.quantisation import METHODS, method_of, note, problem


def groups(**weights: Any) -> dict[str, Any]:
    return {
        "quant_method": "compressed-tensors",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }


AWQ = {"quant_method": "awq", "group_size": 32, "zero_point": True}
GPTQ = {"quant_method": "gptq", "group_size": 32, "desc_act": False, "sym": True}
TESTED: list[Any] = [
    groups(type="int", num_bits=8),
    groups(type="int", num_bits=4),
    {**AWQ, "bits": 4},
    {**GPTQ, "bits": 4},
    {**GPTQ, "bits": 4, "group_size": -1, "desc_act": True},
]
UNTESTED: list[Any] = [
    (groups(type="float", num_bits=8), "compressed-tensors (float 8 bits): not tested"),
    ({**AWQ, "w_bit": 4, "q_group_size": 64}, "awq: not tested"),
    ({**GPTQ, "bits": 8}, "gptq (8 bits): not tested"),
    ({"quant_method": "fp8", "activation_scheme": "dynamic"}, "fp8: not tested"),
    ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes: not tested"),
]
REFUSED: list[Any] = [
    {"quant_method": "compressed-tensors"},
    {"quant_method": "compressed-tensors", "config_groups": 3},
    {"quant_method": "compressed-tensors", "config_groups": {"g": 3}},
    {"quant_method": "compressed-tensors", "config_groups": {"g": {"weights": None}}},
    {"quant_method": "quip"},
    {"quant_method": ["awq"]},
    {},
    "gptq",
    3,
]


@pytest.mark.parametrize("settings", [None, *TESTED], ids=str)
def test_what_is_tested_passes_in_silence(settings: Any) -> None:
    assert problem(method_of(settings), settings) is None
    assert note(method_of(settings), settings) is None


@pytest.mark.parametrize(("settings", "said"), UNTESTED, ids=str)
def test_what_was_never_tried_is_let_through_and_said(settings: Any, said: str) -> None:
    assert problem(method_of(settings), settings) is None
    text = note(method_of(settings), settings)
    assert text is not None and text.startswith(f"weights quantised by {said}")


@pytest.mark.parametrize("settings", REFUSED, ids=str)
def test_what_nobody_supports_is_refused_by_name(settings: Any) -> None:
    text = problem(method_of(settings), settings)
    assert text is not None and text.startswith(f"quantization_config: weights quantised by {method_of(settings)}")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (GPTQ, "bits=None (must be 2, 3, 4, 8)"),
        ({**GPTQ, "bits": "4"}, "bits='4' (must be 2, 3, 4, 8)"),
        ({**GPTQ, "bits": 4, "sym": None}, "sym=None (must be true, false)"),
        ({**GPTQ, "bits": 4, "desc_act": 1}, "desc_act=1 (must be true, false)"),
        ({**GPTQ, "bits": 4, "group_size": 0}, "group_size=0 (must be a whole number of at least 1, or -1 for one"),
        ({**AWQ, "bits": 3}, "bits=3 (must be 4, 8)"),
        ({**AWQ, "w_bit": [4]}, "w_bit=[4] (must be 4, 8)"),
        ({"quant_method": "awq", "bits": 4}, "group_size=None (must be a whole number"),
        ({"quant_method": "fp8"}, "activation_scheme=None (must be static, dynamic)"),
        ({"quant_method": "fp8", "activation_scheme": "nope"}, "activation_scheme='nope' (must be static, dynamic)"),
        (
            {"quant_method": "compressed-tensors", "config_groups": {"g": {"weights": {"type": "int", "num_bits": 8}}}},
            "config_groups.g.targets=None (must be a list of names of layers)",
        ),
    ],
    ids=str,
)
def test_what_vllms_layers_would_break_on_is_refused_by_its_key(settings: dict[str, Any], said: str) -> None:
    text = problem(method_of(settings), settings)
    assert text is not None and text.startswith(
        f"quantization_config: weights quantised by {method_of(settings)}: {said}"
    )


def test_a_method_that_the_operator_names_counts() -> None:
    assert problem("fp8", None) is None
    assert note("fp8", None) is not None
    assert problem("experts_int8", None) == f"weights quantised by experts_int8 (supported: {', '.join(METHODS)})"


@pytest.mark.parametrize("settings", [*TESTED, *(settings for settings, _ in UNTESTED), *REFUSED[:5]], ids=str)
def test_doctor_says_the_same(settings: Any, tmp_path: Path) -> None:
    content = {**DREAM, "architectures": ["DreamModel"], "quantization_config": settings}
    (tmp_path / "config.json").write_text(json.dumps(content))
    found = [f for f in check_model(tmp_path, None) if f.name == "settings"]
    method = method_of(settings)
    refused, said = problem(method, settings), note(method, settings)
    if refused is not None:
        assert [f.status for f in found] == ["problem"] and refused in found[0].text
    else:
        assert [f.text for f in found if f.status != "ok"] == ([said] if said else [])
