"""Sampling parameters of a request, as far as a step needs them. Imports neither vLLM nor torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class EditSpec:
    """What a request asks to be done to its logits before a token is chosen."""

    allowed: tuple[int, ...] = ()  # nothing else may be chosen; () = anything
    bias: tuple[tuple[int, float], ...] = ()  # token id, what is added to its logit
    banned: tuple[int, ...] = ()  # never chosen
    min_tokens: int = 0  # in this many first slots none of ``stop_ids`` is chosen
    stop_ids: tuple[int, ...] = ()
    penalties: tuple[float, float, float] = (1.0, 0.0, 0.0)  # repetition, frequency, presence; these = off


@dataclass(frozen=True)
class SamplingSpec:
    """The part of a request's sampling parameters that the row statistics need."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    stop_token_ids: tuple[int, ...] = ()  # end-of-text included unless the request ignores it
    num_logprobs: int | None = None  # alternatives to report with each token; None = no log-probabilities
    edits: EditSpec = EditSpec()
