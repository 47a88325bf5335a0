"""Fields of the OpenAI server's requests that vLLM would drop without a word for our models (docs/api.md has all)."""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any

from vllm_d2cache.options.request import REPORT, SNAPSHOTS
from vllm_d2cache.options.types import OptionError
from vllm_d2cache.requests.tools import check_tool_names

# Field -> why it can have no effect. Any value but the field's default is refused.
WITHOUT_EFFECT: dict[str, str] = {
    "length_penalty": "it belongs to beam search",
    "media_io_kwargs": "the model reads text alone",
    "mm_processor_kwargs": "the model reads text alone",
    "routed_experts_prompt_start": "routed experts are not returned",
    "suffix": "give a canvas with holes instead (d2cache_canvas)",
    "use_beam_search": "tokens are not written from left to right",
    "watermarking": "the sampler is not vLLM's",
}

# What clients attach for their own bookkeeping; vLLM has no field for it, and no answer depends on it.
BOOKKEEPING = frozenset(
    {"metadata", "prompt_cache_key", "prompt_cache_retention", "safety_identifier", "service_tier", "store"}
)


# Values that ask for nothing, besides null, false and what is empty.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "function_call": ("none",),
    "modalities": (["text"],),
    "top_a": (0,),
    "typical_p": (1,),
    "verbosity": ("medium",),
}
# Objects of which vLLM drops some keys: name -> keys that it knows and drops, and values of those that ask for nothing.
NESTED: dict[str, dict[str, tuple[Any, ...]]] = {
    "output_config": {},
    "reasoning": {"generate_summary": (), "summary": ()},
    "response_format": {},
    "response_format.json_schema": {},
    "stream_options": {"include_obfuscation": (False,)},
    "structured_outputs": {"disable_additional_properties": (False,), "whitespace_pattern": ()},
    "text": {"verbosity": ("medium",)},
    "text.format": {},
}
_LOGPROBS = "message.output_text.logprobs"  # how /v1/responses is asked for log-probabilities
# Of these an empty object is a wish.
_ASKED_FOR_BY_EMPTY = frozenset({"web_search_options"})


def refuse_unknown(unknown: Mapping[str, Any]) -> None:
    """Refuse fields that nobody reads, but for bookkeeping and values that ask for nothing.

    Raises:
        OptionError: naming the first such field.
    """
    for field in sorted(set(unknown) - BOOKKEEPING):
        value = unknown[field]
        empty = value in (None, False, "") or (value in ([], {}) and field not in _ASKED_FOR_BY_EMPTY)
        if not empty and value not in _NEUTRAL.get(field, ()):
            raise OptionError(f"{field}: no such field; plugin options go into vllm_xargs")


def check_nested(name: str, content: Mapping[str, Any], known: Set[str]) -> None:
    """Refuse keys of an object in a request that are dropped, but for values that ask for nothing.

    Args:
        name: the object's own, one of :data:`NESTED`.
        content: all that it has.
        known: names that vLLM's class has for its keys.

    Raises:
        OptionError: naming the first such key.
    """
    for key in sorted(content):
        dropped = key not in known or key in NESTED[name]
        if dropped and content[key] is not None and content[key] not in NESTED[name].get(key, ()):
            raise OptionError(f"{name}.{key}: has no effect here; leave it out")


def check_fields(values: Mapping[str, Any], defaults: Mapping[str, Any], unknown: Mapping[str, Any]) -> None:
    """Refuse what would be dropped, and tools of one name.

    Args:
        values: the request's fields.
        defaults: what a field of :data:`WITHOUT_EFFECT` is in a request that does not set it.
        unknown: what the request has and its class has no field for.

    Raises:
        OptionError: naming the first such field.
    """
    for field, reason in WITHOUT_EFFECT.items():
        value = values.get(field)
        # False is the wish to be without, also where the default is None.
        if value is not None and value is not False and value != defaults[field]:
            raise OptionError(f"{field}: has no effect here ({reason}), got {value!r}; leave it out")
    if values.get("min_p"):  # vLLM forgets it at temperature 0
        raise OptionError(f"min_p: not supported for diffusion language models, got {values['min_p']!r}; leave it out")
    if values.get("top_logprobs") and not values.get("logprobs") and _LOGPROBS not in (values.get("include") or ()):
        raise OptionError(f"top_logprobs: has no effect without logprobs, or include [{_LOGPROBS!r}]; leave it out (0)")
    refuse_unknown(unknown)
    check_tool_names(values.get("tools"), values.get("tool_choice"))
    xargs = values.get("vllm_xargs") or {}
    prompt = values.get("prompt")
    for option in (REPORT, SNAPSHOTS):
        if xargs.get(option) and isinstance(prompt, list) and len(prompt) > 1 and not isinstance(prompt[0], int):
            raise OptionError(f"{option}: is for one prompt, this request has {len(prompt)}; send them one by one")


def check_echo(logprobs: Any) -> None:
    """Refuse log-probabilities in a completion that sends its prompt back.

    Args:
        logprobs: as the request has it; 0 asks for them.

    Raises:
        OptionError: there is nothing to say of the prompt's tokens.
    """
    if logprobs is not None and logprobs is not False:
        raise OptionError(
            "echo: with logprobs it asks for the prompt's log-probabilities, and a prompt token has no distribution of "
            "its own here; leave out one of them"
        )
