"""The front-end patches: ours for our architectures, vLLM's own for all others; and vLLM still needs them."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.config import ModelConfig
from vllm.entrypoints.generate.beam_search.offline import BeamSearchOfflineMixin
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams, StructuredOutputsParams
from vllm.v1.engine.input_processor import InputProcessor

from vllm_d2cache.canvas.traits import FamilyTraits
from vllm_d2cache.compat import front_end
from vllm_d2cache.engine.refusals import check_request
from vllm_d2cache.models.configs import LLaDAConfig
from vllm_d2cache.requests.dropped_fields import check_echo, check_fields, check_nested
from vllm_d2cache.requests.fit import check_room

CHECKS = front_end.FieldChecks(check_fields, check_nested, check_room, check_echo)
pytestmark = pytest.mark.vllm
OURS = frozenset({"LLaDAModelLM"})
BLOCKS = {"SDARForCausalLM": 4}


def model_config(architecture: str, **overrides: Any) -> Any:
    """What the patched method reads of a ModelConfig."""
    return SimpleNamespace(
        architectures=[architecture],
        generation_config="vllm",
        override_generation_config=overrides,
        try_get_generation_config=dict,
        hf_config=SimpleNamespace(traits=lambda: FamilyTraits(0, block_length=BLOCKS.get(architecture))),
    )


@pytest.fixture(autouse=True)
def _unpatched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test installs anew on vLLM's own functions."""
    for cls, name in [
        (ModelConfig, "get_diff_sampling_param"),
        (InputProcessor, "process_inputs"),
        *[(c, "to_sampling_params") for c in (CompletionRequest, ChatCompletionRequest, ResponsesRequest)],
        *[(c, "to_beam_search_params") for c in (CompletionRequest, ChatCompletionRequest)],
    ]:
        monkeypatch.setattr(cls, name, inspect.unwrap(getattr(cls, name)))
    monkeypatch.setattr(CompletionRequest.model_fields["max_tokens"], "default", 16)


def test_defaults_are_ours_for_our_architectures_alone() -> None:
    front_end.install(OURS, CHECKS)
    once = ModelConfig.get_diff_sampling_param
    front_end.install(OURS, CHECKS)
    assert ModelConfig.get_diff_sampling_param is once
    ours = ModelConfig.get_diff_sampling_param(model_config("LLaDAModelLM"))
    assert ours == {"max_tokens": 256, "temperature": 0.0}
    assert isinstance(ours, front_end.CanvasDefaults)
    other = ModelConfig.get_diff_sampling_param(model_config("LlamaForCausalLM", temperature=0.7))
    assert other == {"temperature": 0.7}
    assert type(other) is dict


def test_the_operators_defaults_win() -> None:
    front_end.install(OURS, CHECKS)
    config = model_config("LLaDAModelLM", temperature=0.7, max_new_tokens=64)
    defaults = ModelConfig.get_diff_sampling_param(config)
    assert defaults == {"max_tokens": 64, "temperature": 0.7}
    assert defaults.get("max_tokens") == defaults.cap == 64
    plain = ModelConfig.get_diff_sampling_param(model_config("LLaDAModelLM"))
    assert plain.get("max_tokens") is plain.cap is None, "nothing that vLLM would cut a canvas to"


def test_texts_that_grow_may_take_all_that_is_left() -> None:
    front_end.install(frozenset(BLOCKS), CHECKS)
    config = model_config("SDARForCausalLM")
    defaults = ModelConfig.get_diff_sampling_param(config)
    assert defaults == {"max_tokens": None, "temperature": 0.0}
    assert (defaults.get("max_tokens"), defaults.length(99), defaults.length(0)) == (None, 99, 1)
    absent = CompletionRequest(prompt="x")
    assert absent.to_sampling_params(99, defaults).max_tokens == absent.max_tokens == 99
    # The file of a checkpoint says less than all, and the operator less than that.
    config.try_get_generation_config, config.generation_config = lambda: {"max_new_tokens": 64}, "auto"
    assert ModelConfig.get_diff_sampling_param(config).length(99) == 64
    assert ModelConfig.get_diff_sampling_param(config).length(5) == 5
    front_end.note_longest(config, 48)
    assert ModelConfig.get_diff_sampling_param(config).length(99) == 48


def test_protocol_patches_refuse_what_does_not_fit() -> None:
    front_end.install(OURS, CHECKS)
    defaults = ModelConfig.get_diff_sampling_param(model_config("LLaDAModelLM"))
    absent = CompletionRequest(prompt="x")
    assert absent.max_tokens is None, "as in a chat"
    with pytest.raises(VLLMValidationError, match="max_tokens: the default canvas of 256 positions does not fit"):
        absent.to_sampling_params(99, defaults)
    assert absent.to_sampling_params(300, defaults).max_tokens == absent.max_tokens == 256
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


def admitted(monkeypatch: pytest.MonkeyPatch, **fields: Any) -> tuple[SimpleNamespace, SimpleNamespace]:
    """A request behind vLLM's own processing, and an input processor of our model with 100 positions."""
    params = SamplingParams(**{"max_tokens": 30, **fields.pop("params", {})})
    request = SimpleNamespace(**{"sampling_params": params, "prompt_token_ids": [1] * 70, "priority": 0, **fields})
    monkeypatch.setattr(InputProcessor, "process_inputs", lambda self: request)
    front_end.install_request_check(OURS, check_request)
    model = SimpleNamespace(
        architectures=["LLaDAModelLM"],
        max_model_len=100,
        hf_config=LLaDAConfig(
            d_model=64, n_layers=2, n_heads=4, mlp_hidden_size=128, vocab_size=41, mask_token_id=40, rms_norm_eps=1e-5
        ),
        dtype=torch.float32,
        get_vocab_size=lambda: 41,
    )
    engine = SimpleNamespace(
        model_config=model,
        scheduler_config=SimpleNamespace(policy="fcfs"),
        parallel_config=SimpleNamespace(tensor_parallel_size=1),
        additional_config={},
        lora_config=None,
    )
    return request, SimpleNamespace(model_config=model, vllm_config=engine)


def test_offline_canvas_must_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    request, processor = admitted(monkeypatch, prompt_token_ids=[1] * 80)
    with pytest.raises(VLLMValidationError, match=r"max_tokens: a canvas of 30 .* valid values are 1 to 20"):
        InputProcessor.process_inputs(processor)
    processor.model_config.max_model_len = 110
    assert InputProcessor.process_inputs(processor) is request
    processor.model_config = SimpleNamespace(architectures=["LlamaForCausalLM"], max_model_len=100)
    assert InputProcessor.process_inputs(processor) is request


def test_options_of_another_policy_than_the_servers_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same request is right or wrong, depending on the server's policy."""
    request, processor = admitted(monkeypatch, params={"extra_args": {"d2cache_current_k": 4}})
    assert InputProcessor.process_inputs(processor) is request
    processor.vllm_config.additional_config = {"d2cache": {"policy": "dual"}}
    with pytest.raises(VLLMValidationError, match=r"d2cache_current_k: an option of d2cache_policy 'd2cache'"):
        InputProcessor.process_inputs(processor)
    request.sampling_params.extra_args["d2cache_policy"] = "d2cache"
    assert InputProcessor.process_inputs(processor) is request


def test_options_must_go_with_the_servers(monkeypatch: pytest.MonkeyPatch) -> None:
    request, processor = admitted(monkeypatch, params={"extra_args": {"d2cache_threshold": 0.9}})
    processor.vllm_config.additional_config = {"d2cache": {"decoder": "eb"}}
    with pytest.raises(VLLMValidationError, match="d2cache_threshold: not an option of d2cache_decoder 'eb'"):
        InputProcessor.process_inputs(processor)
    request.sampling_params.extra_args = {"d2cache_steps": 31}  # the canvas of 30 is one window of 32
    assert InputProcessor.process_inputs(processor) is request
    request.sampling_params.extra_args = {"d2cache_steps": 31, "d2cache_window": 10}
    with pytest.raises(VLLMValidationError, match="d2cache_steps: must be a multiple of 3"):
        InputProcessor.process_inputs(processor)
    request.sampling_params.extra_args = {"d2cache_gamma": 0.5}
    assert InputProcessor.process_inputs(processor) is request


def test_wino_needs_room_and_a_canvas_of_holes(monkeypatch: pytest.MonkeyPatch) -> None:
    wino = {"d2cache_decoder": "wino", "d2cache_policy": "full", "d2cache_window": 5}
    canvas = {"d2cache_canvas": [3] + [-1] * 24}
    request, processor = admitted(monkeypatch, params={"max_tokens": 25, "extra_args": wino})
    assert InputProcessor.process_inputs(processor) is request
    request.sampling_params.extra_args = {**wino, "d2cache_window": 6}
    with pytest.raises(VLLMValidationError, match="d2cache_decoder: 'wino' needs 6 positions"):
        InputProcessor.process_inputs(processor)
    request.sampling_params.extra_args = {**wino, **canvas}
    with pytest.raises(VLLMValidationError, match=r"d2cache_decoder: 'wino' .* does not go with d2cache_canvas"):
        InputProcessor.process_inputs(processor)
    request.sampling_params.extra_args = canvas
    assert InputProcessor.process_inputs(processor) is request


def test_a_grammar_does_not_wait_for_reasoning(monkeypatch: pytest.MonkeyPatch) -> None:
    grammar = StructuredOutputsParams(regex="a+")
    request, processor = admitted(monkeypatch, params={"structured_outputs": grammar})
    config = SimpleNamespace(reasoning_parser="", enable_in_reasoning=False, backend="xgrammar")
    processor.vllm_config.structured_outputs_config = config
    assert InputProcessor.process_inputs(processor) is request
    config.reasoning_parser = "qwen3"
    with pytest.raises(VLLMValidationError, match=r"^structured_outputs: .*--reasoning-parser qwen3"):
        InputProcessor.process_inputs(processor)
    config.enable_in_reasoning = True
    assert InputProcessor.process_inputs(processor) is request


def test_json_is_what_the_backend_makes_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    config = SimpleNamespace(reasoning_parser="", enable_in_reasoning=False, backend="xgrammar")
    unread = StructuredOutputsParams(json={"type": "integer", "not": {"const": 3}})
    request, processor = admitted(monkeypatch, params={"structured_outputs": unread})
    processor.vllm_config.structured_outputs_config = config
    with pytest.raises(VLLMValidationError, match=r"^structured_outputs: the JSON schema has 'not'"):
        InputProcessor.process_inputs(processor)
    config.backend = "guidance"
    assert InputProcessor.process_inputs(processor) is request
    tag = '{"type": "structural_tag", "format": {"type": "json_schema", "json_schema": {}}}'
    for backend, limited in (("guidance", False), ("xgrammar", True)):
        config.backend = backend
        request.sampling_params.structured_outputs = StructuredOutputsParams(structural_tag=tag)
        assert InputProcessor.process_inputs(processor) is request
        assert ("max_whitespace_cnt" in request.sampling_params.structured_outputs.structural_tag) == limited


def test_the_decoder_of_a_grammar_may_be_the_servers(monkeypatch: pytest.MonkeyPatch) -> None:
    request, processor = admitted(monkeypatch, params={"structured_outputs": StructuredOutputsParams(regex="a+")})
    processor.vllm_config.structured_outputs_config = SimpleNamespace(
        reasoning_parser="", enable_in_reasoning=False, backend="xgrammar"
    )
    processor.vllm_config.additional_config = {"d2cache": {"decoder": "eb"}}
    with pytest.raises(VLLMValidationError, match=r"d2cache_decoder: with structured output.* got 'eb'"):
        InputProcessor.process_inputs(processor)
    request.sampling_params.extra_args = {"d2cache_decoder": "confidence"}
    assert InputProcessor.process_inputs(processor) is request


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"params": {"logprobs": 42}}, "logprobs: must be 0 to 41"),
        ({"params": {"allowed_token_ids": [40]}}, "allowed_token_ids: leaves no token"),
        ({"params": {"bad_words": ["x"]}}, "bad_words: needs a tokenizer"),
        ({"params": {"extra_args": {"d2cache_canvas": [40] + [-1] * 29}}}, "d2cache_canvas: must hold"),
        ({"prompt_token_ids": None}, "prompt_embeds: not supported"),
        ({"priority": 2}, "priority: has no effect without --scheduling-policy priority"),
    ],
)
def test_what_the_model_cannot_do_is_refused(
    monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any], said: str
) -> None:
    _, processor = admitted(monkeypatch, **fields)
    with pytest.raises(VLLMValidationError, match="^" + said) as caught:
        InputProcessor.process_inputs(processor)
    assert caught.value.parameter == said.partition(":")[0]


def test_priority_is_accepted_where_it_has_an_effect(monkeypatch: pytest.MonkeyPatch) -> None:
    request, processor = admitted(monkeypatch, priority=2)
    processor.vllm_config.scheduler_config.policy = "priority"
    assert InputProcessor.process_inputs(processor) is request


def test_offline_beam_search_is_refused_for_ours_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BeamSearchOfflineMixin, "beam_search", lambda self, prompts: prompts)
    front_end.install_beam_search_check(OURS, CHECKS)
    llm = SimpleNamespace(model_config=SimpleNamespace(architectures=["LLaDAModelLM"]))
    with pytest.raises(VLLMValidationError, match=r"^use_beam_search: has no effect here"):
        BeamSearchOfflineMixin.beam_search(llm, ["x"])
    llm.model_config.architectures = ["LlamaForCausalLM"]
    assert BeamSearchOfflineMixin.beam_search(llm, ["x"]) == ["x"]


def test_a_process_may_have_models_of_several_families_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever came first, requests of both are checked: what is wrapped is wrapped once."""
    request, processor = admitted(monkeypatch, prompt_token_ids=[1] * 80)
    processor.model_config.architectures = ["DreamModel"]
    assert InputProcessor.process_inputs(processor) is request
    front_end.install_request_check(frozenset({"DreamModel"}), check_request)
    for architecture in ("DreamModel", "LLaDAModelLM"):
        processor.model_config.architectures = [architecture]
        with pytest.raises(VLLMValidationError, match=r"max_tokens: a canvas of 30 .* valid values are 1 to 20"):
            InputProcessor.process_inputs(processor)

    monkeypatch.setattr(BeamSearchOfflineMixin, "beam_search", lambda self, prompts: prompts)
    front_end.install_beam_search_check(OURS, CHECKS)
    front_end.install_beam_search_check(frozenset({"DreamModel"}), CHECKS)
    for architecture in ("DreamModel", "LLaDAModelLM"):
        llm = SimpleNamespace(model_config=SimpleNamespace(architectures=[architecture]))
        with pytest.raises(VLLMValidationError, match=r"^use_beam_search: has no effect here"):
            BeamSearchOfflineMixin.beam_search(llm, ["x"])


def test_vllm_still_needs_the_patches() -> None:
    """Fails when vLLM has defaults of its own for these, so that the patches can go."""
    assert ModelConfig.get_diff_sampling_param(model_config("LLaDAModelLM")) == {}
    assert CompletionRequest(prompt="x").max_tokens == 16
    assert CompletionRequest(prompt="x", max_tokens=100).to_sampling_params(99, {}).max_tokens == 99
    assert "prompt" not in inspect.signature(InputProcessor._validate_params).parameters
