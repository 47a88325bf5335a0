"""Has vLLM's front end check every request: a logits processor that modifies nothing.

vLLM calls ``validate_params`` of every configured logits processor for each request, in the front end, and turns a
ValueError into HTTP 400 (or raises it from ``LLM.generate``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from vllm.sampling_params import RequestOutputKind
from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsContext, LogitsProcessor

from vllm_d2cache.requests.check import check_sampling_params

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.sampling_params import SamplingParams


class RequestCheck(LogitsProcessor):
    """Named in ``ModelConfig.logits_processors`` by the config hook."""

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """See requests/check.py."""
        check_sampling_params(sampling_params, sampling_params.output_kind == RequestOutputKind.DELTA)

    def __init__(self, vllm_config: VllmConfig, req_states: Any) -> None:
        pass

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        """It modifies no logits."""
        return False

    def apply(self, logits: torch.Tensor, ctx: LogitsContext) -> torch.Tensor:
        """It modifies no logits."""
        return logits
