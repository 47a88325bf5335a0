"""The front-end patches: ours for our architectures, vLLM's own for all others; and vLLM still needs them."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.config import ModelConfig
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
from vllm.exceptions import VLLMValidationError
from vllm.v1.engine.input_processor import InputProcessor

from vllm_d2cache.compat import front_end

pytestmark = pytest.mark.vllm
OURS = frozenset({"LLaDAModelLM"})


def model_config(architecture: str, **overrides: Any) -> Any:
    """What the patched method reads of a ModelConfig."""
    return SimpleNamespace(
        architectures=[architecture],
        generation_config="vllm",
        override_generation_config=overrides,
        try_get_generation_config=dict,
    )


@pytest.fixture(autouse=True)
def _unpatched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test installs anew on vLLM's own functions."""
    for cls, name in [
        (ModelConfig, "get_diff_sampling_param"),
        (InputProcessor, "process_inputs"),
        *[(c, "to_sampling_params") for c in (CompletionRequest, ChatCompletionRequest, ResponsesRequest)],
    ]:
        monkeypatch.setattr(cls, name, inspect.unwrap(getattr(cls, name)))
    monkeypatch.setattr(CompletionRequest.model_fields["max_tokens"], "default", 16)


def test_defaults_are_ours_for_our_architectures_alone() -> None:
    front_end.install(OURS)
    once = ModelConfig.get_diff_sampling_param
    front_end.install(OURS)
    assert ModelConfig.get_diff_sampling_param is once
    ours = ModelConfig.get_diff_sampling_param(model_config("LLaDAModelLM"))
    assert ours == {"max_tokens": 256, "temperature": 0.0}
    assert isinstance(ours, front_end.CanvasDefaults)
    other = ModelConfig.get_diff_sampling_param(model_config("LlamaForCausalLM", temperature=0.7))
    assert other == {"temperature": 0.7}
    assert type(other) is dict


def test_the_operators_defaults_win() -> None:
    front_end.install(OURS)
    config = model_config("LLaDAModelLM", temperature=0.7, max_new_tokens=64)
    assert ModelConfig.get_diff_sampling_param(config) == {"max_tokens": 64, "temperature": 0.7}


def test_protocol_patches_refuse_what_does_not_fit() -> None:
    front_end.install(OURS)
    defaults = ModelConfig.get_diff_sampling_param(model_config("LLaDAModelLM"))
    assert CompletionRequest(prompt="x").max_tokens == 256
    cases = [
        (CompletionRequest(prompt="x", max_tokens=100), "max_tokens"),
        (ChatCompletionRequest(messages=[], max_tokens=100), "max_tokens"),
        (ChatCompletionRequest(messages=[], max_completion_tokens=100), "max_completion_tokens"),
        (ResponsesRequest(input="x", max_output_tokens=100), "max_output_tokens"),
    ]
    for request, field in cases:
        with pytest.raises(VLLMValidationError, match=f"{field}: a canvas of 100 positions"):
            request.to_sampling_params(99, defaults)
        assert request.to_sampling_params(100, defaults).max_tokens == 100
        # Another model's defaults are a plain dictionary: vLLM cuts, as it always did.
        assert request.to_sampling_params(99, {}).max_tokens == 99


def test_offline_canvas_must_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    request = SimpleNamespace(sampling_params=SimpleNamespace(max_tokens=30), prompt_token_ids=[1] * 80)
    monkeypatch.setattr(InputProcessor, "process_inputs", lambda self: request)
    front_end.install_length_check(OURS)
    processor = SimpleNamespace(
        model_config=SimpleNamespace(architectures=["LLaDAModelLM"], max_model_len=100),
        vllm_config=SimpleNamespace(additional_config={}),
    )
    with pytest.raises(VLLMValidationError, match=r"max_tokens: a canvas of 30 .* valid values are 1 to 20"):
        InputProcessor.process_inputs(processor)
    processor.model_config.max_model_len = 110
    assert InputProcessor.process_inputs(processor) is request
    processor.model_config = SimpleNamespace(architectures=["LlamaForCausalLM"], max_model_len=100)
    assert InputProcessor.process_inputs(processor) is request


def test_vllm_still_needs_the_patches() -> None:
    """Fails when vLLM has defaults of its own for these, so that the patches can go."""
    assert ModelConfig.get_diff_sampling_param(model_config("LLaDAModelLM")) == {}
    assert CompletionRequest(prompt="x").max_tokens == 16
    assert CompletionRequest(prompt="x", max_tokens=100).to_sampling_params(99, {}).max_tokens == 99
    assert "prompt" not in inspect.signature(InputProcessor._validate_params).parameters
