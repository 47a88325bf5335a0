"""Tokenizers of checkpoints whose tokenizer_config.json names a class of their authors."""

from __future__ import annotations

from transformers.models.qwen2.tokenization_qwen2 import Qwen2Tokenizer


class DreamTokenizer(Qwen2Tokenizer):
    """Dream's tokenizer: Qwen2.5's under the name that its tokenizer_config.json asks for.

    Its special tokens, its chat template and ``add_bos_token`` come from the checkpoint's files.
    """
