"""Which field of a request an error of vLLM's is about, where it does not say so itself."""

from __future__ import annotations

import re
from collections.abc import Set

# Text of an error -> where the request says what is wrong; of several fields the first that the request sets.
_GRAMMAR = ("structured_outputs", "response_format", "text", "tools")
_PROMPT = ("prompt", "messages", "input")
_ABOUT: tuple[tuple[str, tuple[str, ...]], ...] = (
    (r"is out of vocabulary$", _PROMPT),
    (r"decoder prompt cannot be empty", ("truncate_prompt_tokens", *_PROMPT)),
    (r"at least one prompt|empty conversation", _PROMPT),
    (r"for ValidatorIterator", ("messages", "input")),
    (r"for ResponsesResponse", ("background", "truncation", "metadata")),
    (r"structured outputs constraint|grammar|structural tag|^Choice ", _GRAMMAR),
    (r"extra_args", ("vllm_xargs",)),
    (r"beam search", ("use_beam_search",)),
    (r"tool choice requires|[Tt]ool with name", ("tool_choice", "tools")),
    (r"not a multimodal model|content part type|TextEncodeInput", _PROMPT),
    (r"^max_tokens must be|max_completion_tokens=", ("max_output_tokens", "max_completion_tokens", "max_tokens")),
    (r"^stop cannot", ("stop", "stop_sequences")),
)
# A field that others are made into on the way -> what the client may have called it.
_MADE_OF: dict[str, tuple[str, ...]] = {
    "logprobs": ("top_logprobs",),
    "max_tokens": ("max_output_tokens", "max_completion_tokens"),
    "structured_outputs": ("response_format", "text", "output_config", "tools"),
    "thinking_token_budget": ("thinking",),
}


def in_words_of(message: str, fields: Set[str]) -> str:
    """The same message, naming the field as the request does that set ``fields``."""
    name, colon, rest = message.partition(":")
    if not colon or name in fields:
        return message
    return next((own for own in _MADE_OF.get(name, ()) if own in fields), name) + colon + rest


def field_of(message: str, fields: Set[str]) -> str | None:
    """The field that the message is about; None if it names one of the request's, or nobody knows.

    Args:
        message: vLLM's.
        fields: those that the request sets.
    """
    for pattern, names in _ABOUT:
        if re.search(pattern, message):
            found = next((name for name in names if name in fields), None)
            return None if found is None or re.search(rf"\b{found}\b", message) else found
    return None
