"""Fast-dLLM v2 (1.5B and 7B), made from Qwen2.5: 3 tensors and 12 a layer."""

from __future__ import annotations

from vllm_d2cache.models.qwen import QwenNames


class Fast_dLLM_QwenForCausalLM(QwenNames):
    """The architecture name of the published checkpoints."""
