"""How many rows a step of a request can have, and what it takes for that."""

from __future__ import annotations

from vllm_d2cache.decoders.registry import DECODER_CLASSES
from vllm_d2cache.mechanisms.base import Use
from vllm_d2cache.options.request import RequestOptions
from vllm_d2cache.policies.registry import policy_class


def uses_of(options: RequestOptions) -> tuple[Use, ...]:
    """The mechanisms of a request's policy and decoder."""
    return (*policy_class(options.policy, options.block).uses, *DECODER_CLASSES[options.decoder].uses)


def extra_rows(options: RequestOptions, canvas_len: int) -> int:
    """Most rows behind the text in a step; their positions are reserved behind it."""
    window = options.window_length(canvas_len)
    return sum(use.extra_rows(window) for use in uses_of(options))


def row_budget(options: RequestOptions, prompt_len: int, canvas_len: int, refresh_budget: int | None) -> int:
    """A bound on the rows of any step of a request after its first: its policy's, and what its decoding adds.

    That is a row for the leftmost mask where tokens are committed from left to right, and rows behind the text.
    """
    policy = policy_class(options.policy, options.block)
    rows = policy.max_rows(options, prompt_len, canvas_len, refresh_budget)
    if options.ordered:
        rows = min(rows + 1, prompt_len + canvas_len)
    return rows + extra_rows(options, canvas_len)
