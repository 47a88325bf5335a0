"""The part of vLLM's SamplingParams that a step needs, in this package's records."""

from __future__ import annotations

import hashlib
from typing import Any

from vllm_d2cache.canvas.request import EditSpec, SamplingSpec


def sampling_spec(params: Any, req_id: str, engine_seed: int) -> SamplingSpec:
    """What is left to say of parameters that requests/fit.py let through."""
    stop = list(params.stop_token_ids or ())
    if params.eos_token_id is not None:
        stop.append(params.eos_token_id)
    seed = params.seed
    if seed is None:
        # The same on every rank, different for every request.
        digest = hashlib.blake2b(f"{engine_seed}:{req_id}".encode(), digest_size=8).digest()
        seed = int.from_bytes(digest, "little", signed=True)
    return SamplingSpec(
        params.temperature,
        params.top_p,
        max(0, params.top_k),
        seed,
        tuple(dict.fromkeys(stop)),
        params.logprobs,
        _edit_spec(params),
    )


def _edit_spec(params: Any) -> EditSpec:
    """Bad words are of one token each, lists leave something to choose."""
    return EditSpec(
        tuple(params.allowed_token_ids or ()),
        tuple((params.logit_bias or {}).items()),
        tuple(ids[0] for ids in params.bad_words_token_ids or ()),
        params.min_tokens,
        tuple(sorted(params.all_stop_token_ids)),
        (params.repetition_penalty, params.frequency_penalty, params.presence_penalty),
    )
