"""What vLLM's runner gets of our sampler, and what ranks send each other."""

from __future__ import annotations

import gc
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vllm_d2cache.engine import model_state, runner_sampler
from vllm_d2cache.engine.runner_sampler import D2CacheSampler

pytestmark = pytest.mark.vllm


@pytest.mark.parametrize(("slots", "most"), [(1, 1), (10, 1), (10, 10), (16, 16), (33, 17), (64, 64), (100, 3)])
def test_tokens_are_a_multiple_of_columns(slots: int, most: int) -> None:
    """vLLM's Triton kernel takes their stride: 1, multiples of 16 and others are three kernels, compiled when met."""
    tokens = torch.arange(3 * slots).view(3, slots)
    found = runner_sampler._in_width(tokens, most)
    assert found.is_contiguous() and found.stride(0) % 16 == 0
    assert torch.equal(found[:, :most], tokens[:, :most])
    assert runner_sampler._nothing(3, tokens.device).sampled_token_ids.stride(0) % 16 == 0


@pytest.mark.parametrize("shape", [(7,), (2, 53), (9, 3), (0, 3)])
def test_ranks_add_in_one_row(monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...]) -> None:
    """What has two dimensions vLLM may send through FlashInfer, which raises at most of our widths."""
    sent = []

    def all_reduce(values: torch.Tensor) -> torch.Tensor:
        sent.append(values.shape)
        return values * 2

    monkeypatch.setattr(model_state, "tensor_model_parallel_all_reduce", all_reduce)
    values = torch.rand(*shape)
    assert torch.equal(model_state.sum_of_ranks(values), values * 2)
    assert sent == [(values.numel(),)]
    if values.dim() == 2:
        assert torch.equal(model_state.sum_of_ranks(values.t()), values.t() * 2)


def test_a_sampler_does_not_keep_the_weights() -> None:
    """vLLM drops the state of a runner that it shuts down, and keeps the sampler."""

    class State:
        step = None

    state: Any = State()
    sampler = D2CacheSampler(state, SimpleNamespace(sampling_states=None))
    assert sampler._state() is state
    del state
    gc.collect()
    assert sampler._state() is None
