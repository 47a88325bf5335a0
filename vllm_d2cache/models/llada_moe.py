"""LLaDA-MoE (7B-A1B Base and Instruct): 3 tensors, and 9 + 3 an expert in each layer. docs/models.md has the source."""

from __future__ import annotations

from vllm_d2cache.models.qwen import QwenMoeNames


class LLaDAMoEModelLM(QwenMoeNames):
    """The architecture name of the published checkpoints."""
