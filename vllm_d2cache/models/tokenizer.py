"""Tokenizers of checkpoints whose tokenizer_config.json names a class of their authors."""

from __future__ import annotations

from transformers import AutoTokenizer
from transformers.models.qwen2.tokenization_qwen2 import Qwen2Tokenizer

from vllm_d2cache.models.configs import DreamConfig


class DreamTokenizer(Qwen2Tokenizer):
    """Dream's tokenizer: Qwen2.5's under the name that its tokenizer_config.json asks for.

    Its special tokens, its chat template and ``add_bos_token`` come from the checkpoint's files.
    """


def register_tokenizers() -> None:
    """Let AutoTokenizer find the class here, although the checkpoint's auto_map points to remote code."""
    AutoTokenizer.register(DreamConfig, tokenizer_class=DreamTokenizer, exist_ok=True)
