"""Refuses, before a request is admitted, what would otherwise be ignored: unknown options and unsupported fields.

vLLM calls ``validate_params`` of every configured logits processor for each request, in the front end, and turns a
ValueError into HTTP 400 (or raises it from ``LLM.generate``). This processor does nothing else.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from vllm.sampling_params import RequestOutputKind
from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsContext, LogitsProcessor

from vllm_d2cache.config import REPORT, parse_request_options
from vllm_d2cache.figures import wants_report
from vllm_d2cache.infill import parse_canvas
from vllm_d2cache.snapshots import snapshot_interval

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.sampling_params import SamplingParams

# Field -> the values that mean "not used".
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "min_p": (0.0,),
    "prompt_logprobs": (None,),
    "prompt_logprob_token_ids": (None,),
    "logprob_token_ids": (None,),
    "structured_outputs": (None,),
    "repetition_detection": (None,),
    "thinking_token_budget": (None,),
    "trace_decode_token_ids": (None, []),
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
    parse_canvas(params.extra_args)
    snapshot_interval(params.extra_args)
    if wants_report(params.extra_args) and (params.n > 1 or params.output_kind == RequestOutputKind.DELTA):
        raise ValueError(f"{REPORT}: comes with a whole answer; not with stream, and not with n > 1")


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
