"""Refuses, before a request is admitted, what would otherwise be ignored: unknown options and unsupported fields.

vLLM calls ``validate_params`` of every configured logits processor for each request, in the front end, and turns a
ValueError into HTTP 400 (or raises it from ``LLM.generate``). This processor does nothing else.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from vllm.sampling_params import RequestOutputKind
from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsContext, LogitsProcessor

from vllm_d2cache.canvas.grammar import is_constrained
from vllm_d2cache.observe.figures import wants_report
from vllm_d2cache.observe.snapshots import snapshot_interval
from vllm_d2cache.options.server import CANVAS, REPORT, parse_request_options
from vllm_d2cache.requests.asked import parse_canvas

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.sampling_params import SamplingParams

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


def check_sampling_params(params: SamplingParams) -> None:
    """Raise ValueError naming the first field that a diffusion model cannot honour.

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
    if params.seed is not None and not -(2**63) <= params.seed < 2**63:
        raise ValueError(f"seed: must be an integer of 64 bits, got {params.seed}")
    # Whether the options go together depends on the server's as well: compat/front_end.py asks that.
    parse_request_options(params.extra_args)
    canvas = parse_canvas(params.extra_args)
    if is_constrained(params):
        _check_with_grammar(params, bool(canvas))
    snapshot_interval(params.extra_args)
    if wants_report(params.extra_args) and (params.n > 1 or params.output_kind == RequestOutputKind.DELTA):
        raise ValueError(f"{REPORT}: comes with a whole answer; not with stream, and not with n > 1")


def _check_with_grammar(params: SamplingParams, canvas: bool) -> None:
    """Refuse what could leave a grammar without a token to go on with."""
    what = "structured output (response_format, tool_choice 'required' or a named tool)"
    for field, reason in _NOT_WITH_GRAMMAR.items():
        if value := getattr(params, field):
            raise ValueError(f"{field}: does not go with {what}: {reason}; got {value!r}, leave it out")
    if canvas:
        raise ValueError(f"{CANVAS}: does not go with {what}: given tokens would have to fit the grammar; leave it out")


class RequestCheck(LogitsProcessor):
    """Named in ``ModelConfig.logits_processors`` by the config hook."""

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """See :func:`check_sampling_params`."""
        check_sampling_params(sampling_params)

    def __init__(self, vllm_config: VllmConfig, req_states: Any) -> None:
        pass

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        """It modifies no logits."""
        return False

    def apply(self, logits: torch.Tensor, ctx: LogitsContext) -> torch.Tensor:
        """It modifies no logits."""
        return logits
