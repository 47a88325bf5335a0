"""Whether config.json and the tokenizer mean the same mask token: a wrong one gives nonsense, not errors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def mask_contradiction(tokenizer_config: Mapping[str, Any], mask_token_id: int) -> str | None:
    """What is wrong, or None: also where the tokenizer has no mask token, or its file does not say which id it has.

    Args:
        tokenizer_config: the object in tokenizer_config.json.
        mask_token_id: the model's.
    """
    token, added = tokenizer_config.get("mask_token"), tokenizer_config.get("added_tokens_decoder")
    text = token.get("content") if isinstance(token, Mapping) else token
    if not isinstance(text, str) or not isinstance(added, Mapping):
        return None
    ids = [id for id, entry in added.items() if isinstance(entry, Mapping) and entry.get("content") == text]
    if not ids or str(mask_token_id) in map(str, ids):
        return None
    return (
        f"mask_token_id={mask_token_id}, but tokenizer_config.json's mask_token {text!r} has the id {', '.join(ids)} "
        f"(--hf-overrides '{{\"mask_token_id\": {ids[0]}}}' if that is right)"
    )
