"""Limits that vLLM's front end enforces for us: a request beyond one is refused before it is admitted."""

from __future__ import annotations

import inspect
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.v1.engine.input_processor import InputProcessor

from vllm_d2cache.compat import front_end
from vllm_d2cache.engine.config_hook import _refusals
from vllm_d2cache.engine.refusals import check_request
from vllm_d2cache.models.shape import Mixture, TransformerShape
from vllm_d2cache.requests.check import check_sampling_params

pytestmark = pytest.mark.vllm

MAX_LEN = 20_000
SHAPE = TransformerShape(
    hidden_size=64,
    num_layers=8,
    num_heads=4,
    num_kv_heads=4,
    intermediate_size=128,
    vocab_size=41,
    embedding_size=41,
    max_positions=MAX_LEN,
    norm_eps=1e-6,
    rope_theta=1e4,
)


def admit(monkeypatch: pytest.MonkeyPatch, canvas: int, additional: Any) -> Any:
    """Send a request through the patched front end of a server of ours."""
    params = SamplingParams(max_tokens=canvas)
    request = SimpleNamespace(sampling_params=params, prompt_token_ids=[1, 2], priority=0)
    stock = inspect.unwrap(InputProcessor.process_inputs)
    monkeypatch.setattr(InputProcessor, "process_inputs", stock)
    monkeypatch.setattr(InputProcessor, "process_inputs", lambda self: request)
    front_end.install_request_check(frozenset({"LLaDAModelLM"}), check_request)
    model = SimpleNamespace(
        architectures=["LLaDAModelLM"],
        max_model_len=MAX_LEN,
        hf_config=SimpleNamespace(mask_token_id=40, shape=lambda: SHAPE),
        dtype=torch.bfloat16,
        get_vocab_size=lambda: 41,
    )
    config = SimpleNamespace(
        additional_config=additional,
        lora_config=None,
        scheduler_config=SimpleNamespace(policy="fcfs"),
        model_config=model,
        parallel_config=SimpleNamespace(tensor_parallel_size=1),
    )
    return InputProcessor.process_inputs(SimpleNamespace(model_config=model, vllm_config=config))


def test_the_operators_longest_canvas(monkeypatch: pytest.MonkeyPatch) -> None:
    limited = {"d2cache": {"max_canvas": 300}}
    assert admit(monkeypatch, 300, limited).sampling_params.max_tokens == 300
    with pytest.raises(VLLMValidationError, match="max_tokens: this server allows canvases of 1 to 300 positions"):
        admit(monkeypatch, 301, limited)
    for unlimited in ({}, {"d2cache": {}}, None):
        assert admit(monkeypatch, MAX_LEN - 2, unlimited).sampling_params.max_tokens == MAX_LEN - 2


def test_a_request_that_takes_more_memory_than_all_may(monkeypatch: pytest.MonkeyPatch) -> None:
    limited = {"d2cache": {"request_memory": 0.01, "policy": "dllm_cache"}}
    fits = int(0.01 * 2**30) // (7 * 64 * 2) - 1  # layers but the first, width, bytes: of canvas and one position more
    assert admit(monkeypatch, fits, limited).sampling_params.max_tokens == fits
    with pytest.raises(VLLMValidationError, match=r"max_tokens: with d2cache_policy 'dllm_cache', 2 prompt tokens and"):
        admit(monkeypatch, fits + 1, limited)
    assert admit(monkeypatch, fits + 1, {"d2cache": {"request_memory": 0.01, "policy": "full"}})


def test_stop_tokens() -> None:
    check_sampling_params(SamplingParams(max_tokens=4, stop_token_ids=list(range(128))), False)
    with pytest.raises(ValueError, match=r"stop_token_ids: at most 128 .* got 129"):
        check_sampling_params(SamplingParams(max_tokens=4, stop_token_ids=list(range(129))), False)


def test_sleep_mode_is_refused_at_start_up() -> None:
    """On its own: a CPU's vLLM refuses it before us."""
    config = SimpleNamespace(
        parallel_config=SimpleNamespace(
            pipeline_parallel_size=1,
            decode_context_parallel_size=1,
            prefill_context_parallel_size=1,
            enable_dbo=False,
            data_parallel_size=1,
        ),
        kv_transfer_config=None,
        speculative_config=None,
        lora_config=None,
        cache_config=SimpleNamespace(cache_dtype="auto"),
        load_config=SimpleNamespace(load_format="auto"),
        structured_outputs_config=SimpleNamespace(backend="xgrammar"),
        compilation_config=SimpleNamespace(cudagraph_capture_sizes=None, max_cudagraph_capture_size=None, mode=None),
        model_config=SimpleNamespace(
            enable_sleep_mode=True,
            dtype="torch.bfloat16",
            logprobs_mode="raw_logprobs",
            quantization=None,
            hf_config=SimpleNamespace(quantisation_problem=lambda method: None),
        ),
    )
    (reason,) = _refusals(config)
    assert reason.startswith("--enable-sleep-mode (")
    config.model_config.enable_sleep_mode = False
    assert _refusals(config) == []
    config.lora_config, config.model_config.hf_config.shape = object(), lambda: SHAPE
    assert _refusals(config) == []
    config.model_config.hf_config.shape = lambda: replace(SHAPE, mixture=Mixture(4, 2, 16))
    (reason,) = _refusals(config)
    assert reason.startswith("--enable-lora (")
