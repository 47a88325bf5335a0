"""Patch: defaults of a request that names no max_tokens or temperature, for our architectures only."""

from __future__ import annotations

import functools
from typing import Any

from vllm_d2cache.config import DEFAULT_CANVAS_LENGTH

_MARK = "_vllm_d2cache_defaults"


def install(architectures: frozenset[str]) -> None:
    """Wrap ``ModelConfig.get_diff_sampling_param``; idempotent.

    Without it a chat request without max_tokens gets all of max_model_len as its canvas, and is sampled at
    temperature 1. No hook serves: ``override_generation_config["max_new_tokens"]`` is a cap, not a default. Remove
    when vLLM lets a model config hook set a default for max_tokens.
    """
    from vllm.config import ModelConfig

    original = ModelConfig.get_diff_sampling_param
    if hasattr(original, _MARK):
        return

    @functools.wraps(original)
    def get_diff_sampling_param(self: ModelConfig) -> dict[str, Any]:
        params = original(self)
        if architectures.isdisjoint(self.architectures):
            return params
        return {"max_tokens": DEFAULT_CANVAS_LENGTH, "temperature": 0.0, **params}

    setattr(get_diff_sampling_param, _MARK, True)
    ModelConfig.get_diff_sampling_param = get_diff_sampling_param
