"""SDAR and TraDo, made from Qwen3: 3 tensors and 11 a layer; SDAR-MoE, from Qwen3-MoE: 3, and 9 + 3 an expert."""

from __future__ import annotations

from vllm_d2cache.models.qwen import QwenMoeNames, QwenNames


class SDARForCausalLM(QwenNames):
    """The architecture name of the published checkpoints."""


class SDARMoeForCausalLM(QwenMoeNames):
    """The architecture name of the published checkpoints."""
