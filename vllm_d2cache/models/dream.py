"""Dream (Base, Instruct, Dream-Coder, DiffuCoder and their kin), made from Qwen2.5: 3 tensors and 12 a layer."""

from __future__ import annotations

from vllm_d2cache.models.qwen import QwenNames


class DreamModel(QwenNames):
    """The architecture name of the published checkpoints."""
