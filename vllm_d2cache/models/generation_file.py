"""What a checkpoint's generation_config.json may say besides sampling defaults (requests/generation_defaults.py).

vLLM gives its end tokens to every request, and transformers reads all of it before anybody is asked.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from vllm_d2cache.models.config_rules import is_token

# Keys of token ids. The mask stands for what is not written yet: where a text ended or was padded with it, it never
# would be.
_NOT_THE_MASK = ("eos_token_id", "pad_token_id", "stop_token_ids")
_IDS = (*_NOT_THE_MASK, "bos_token_id")
_LISTS = ("eos_token_id", "stop_token_ids")


def problems(content: Mapping[str, Any], vocab_size: int, mask: int) -> dict[str, str]:
    """Key -> why it is refused, naming key and value; empty if nothing is.

    Args:
        content: of the file.
        mask: the model's mask token.
    """
    return {**_stumbles(content), **dict(_token_problems(content, vocab_size, mask))}


def _token_problems(content: Mapping[str, Any], vocab_size: int, mask: int) -> Iterator[tuple[str, str]]:
    for key in _IDS:
        value = content.get(key)
        ids = value if isinstance(value, list) and key in _LISTS else [value]
        if value is None:
            continue
        is_mask = key in _NOT_THE_MASK and any(is_token(i, vocab_size) and i == mask for i in ids)
        if is_mask or not all(is_token(i, vocab_size) for i in ids):
            noun = "an id or a list of ids" if key in _LISTS else "an id"
            but = f", and not the mask_token_id {mask}" if key in _NOT_THE_MASK else ""
            yield key, f"{key}={value!r} (must be {noun} from 0 to {vocab_size - 1}{but})"


def _stumbles(content: Mapping[str, Any]) -> dict[str, str]:
    """Keys that transformers cannot take; its own errors name neither the file nor always the key."""
    if (whole := _error(content)) is None:
        return {}
    # Some values are wrong by themselves, some only beside others.
    each = {key: error for key, value in content.items() if (error := _error({key: value})) is not None}
    alone = {key: f"{key}={content[key]!r} (transformers cannot read it: {error})" for key, error in each.items()}
    return alone or {"": f"as a whole (transformers cannot read it: {whole})"}


def _error(content: Mapping[str, Any]) -> str | None:
    from transformers import GenerationConfig

    try:
        GenerationConfig.from_dict(dict(content)).to_diff_dict()
    except Exception as error:  # of any kind, as the values are
        return " ".join(str(error).split())
    return None
