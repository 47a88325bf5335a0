"""Fields of the OpenAI server's requests that vLLM would drop without a word for our models (docs/api.md has all)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm_d2cache.options.request import REPORT, SNAPSHOTS
from vllm_d2cache.options.types import OptionError

# Field -> why it can have no effect. Any value but the field's default is refused.
WITHOUT_EFFECT: dict[str, str] = {
    "length_penalty": "it belongs to beam search",
    "media_io_kwargs": "the model reads text alone",
    "mm_processor_kwargs": "the model reads text alone",
    "routed_experts_prompt_start": "the model has no experts",
    "suffix": "give a canvas with holes instead (d2cache_canvas)",
    "use_beam_search": "tokens are not written from left to right",
    "watermarking": "the sampler is not vLLM's",
}

# What clients attach for their own bookkeeping; vLLM has no field for it, and no answer depends on it.
BOOKKEEPING = frozenset(
    {"metadata", "prompt_cache_key", "prompt_cache_retention", "safety_identifier", "service_tier", "store"}
)


def check_fields(values: Mapping[str, Any], defaults: Mapping[str, Any], unknown: Mapping[str, Any]) -> None:
    """Refuse what would be dropped.

    Args:
        values: the request's fields.
        defaults: what a field of :data:`WITHOUT_EFFECT` is in a request that does not set it.
        unknown: what the request has and its class has no field for; None and False mean absent.

    Raises:
        OptionError: naming the first such field.
    """
    for field, reason in WITHOUT_EFFECT.items():
        value = values.get(field)
        # False is the wish to be without, also where the default is None.
        if value is not None and value is not False and value != defaults[field]:
            raise OptionError(f"{field}: has no effect here ({reason}), got {value!r}; leave it out")
    for field in sorted(set(unknown) - BOOKKEEPING):
        if unknown[field] is None or unknown[field] is False:
            continue
        raise OptionError(f"{field}: no such field; plugin options go into vllm_xargs")
    xargs = values.get("vllm_xargs") or {}
    prompt = values.get("prompt")
    for option in (REPORT, SNAPSHOTS):
        if xargs.get(option) and isinstance(prompt, list) and len(prompt) > 1 and not isinstance(prompt[0], int):
            raise OptionError(f"{option}: is for one prompt, this request has {len(prompt)}; send them one by one")
