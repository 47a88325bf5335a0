"""What of a request's sampling parameters cannot be honoured, whatever the model and the server's options."""

from __future__ import annotations

from typing import Any

from vllm_d2cache.options.request import CANVAS, REPORT
from vllm_d2cache.requests.asked import Asked

# Field -> the values that mean "not used".
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "min_p": (0.0,),
    "prompt_logprobs": (None,),
    "prompt_logprob_token_ids": (None,),
    "logprob_token_ids": (None,),
    "repetition_detection": (None,),
    "thinking_token_budget": (None,),
    "trace_decode_token_ids": (None, []),
}


# Field -> why it cannot be had together with a grammar.
_NOT_WITH_GRAMMAR: dict[str, str] = {
    "ignore_eos": "the text ends where the grammar does",
    "min_tokens": "where the grammar is complete only the end may follow",
    "bad_words": "the grammar may leave no other token",
    "allowed_token_ids": "the grammar may leave none of them",
}

# The worker holds as many for every slot as the request with the most.
_MOST_STOP_TOKENS = 128


def check_sampling_params(params: Any, streams: bool) -> None:
    """Raise ValueError naming the first field that a diffusion model cannot honour.

    Args:
        params: vLLM's SamplingParams.
        streams: its text is sent piece by piece.

    Raises:
        ValueError: a field or option is unsupported, unknown or out of range.
    """
    for field, unused in _UNSUPPORTED.items():
        value = getattr(params, field, None)
        if not any(value is u or (u is not None and not hasattr(value, "shape") and value == u) for u in unused):
            allowed = " or ".join(repr(u) for u in unused)
            raise ValueError(
                f"{field}: not supported for this diffusion language model, got {value!r}; leave it out ({allowed})"
            )
    if params.max_tokens is None:
        raise ValueError("max_tokens: must be an integer >= 1 (the length of the canvas), got None")
    if len(params.stop_token_ids or ()) > _MOST_STOP_TOKENS:
        raise ValueError(
            f"stop_token_ids: at most {_MOST_STOP_TOKENS} (every committed token is compared with each), "
            f"got {len(params.stop_token_ids)}"
        )
    for field in type(params).__struct_fields__:  # they cross to another process
        value = getattr(params, field)
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise ValueError(f"{field}: must be an integer of 64 bits, got {value}")
    # Whether the options go together depends on the server's as well: engine/refusals.py asks that.
    asked = Asked.of(params)
    if asked.constrained:
        _check_with_grammar(params, bool(asked.canvas))
    if asked.report and (params.n > 1 or streams):
        raise ValueError(f"{REPORT}: comes with a whole answer; not with stream, and not with n > 1")


def _check_with_grammar(params: Any, canvas: bool) -> None:
    """Refuse what could leave a grammar without a token to go on with."""
    what = "structured output (response_format, tool_choice 'required' or a named tool)"
    for field, reason in _NOT_WITH_GRAMMAR.items():
        if value := getattr(params, field):
            raise ValueError(f"{field}: does not go with {what}: {reason}; got {value!r}, leave it out")
    if canvas:
        raise ValueError(f"{CANVAS}: does not go with {what}: given tokens would have to fit the grammar; leave it out")
