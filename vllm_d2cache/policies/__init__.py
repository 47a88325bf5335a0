"""Cache policies: which positions to recompute. One class a policy, found by name (policy_registry)."""

from __future__ import annotations

from vllm_d2cache.options.plugins import POLICY_CLASSES
from vllm_d2cache.options.server import RequestOptions
from vllm_d2cache.policies.base import CachePolicy


def row_budget(options: RequestOptions, prompt_len: int, canvas_len: int, refresh_budget: int | None) -> int:
    """A bound on the rows of any step of a request after its first: its policy's, and what its decoding adds.

    That is a row for the leftmost mask where tokens are committed from left to right, and the shadows of its decoder.
    """
    rows = POLICY_CLASSES[options.policy].max_rows(options, prompt_len, canvas_len, refresh_budget)
    if options.ordered:
        rows = min(rows + 1, prompt_len + canvas_len)
    return rows + options.shadow_length(canvas_len)


__all__ = ["POLICY_CLASSES", "CachePolicy", "row_budget"]
