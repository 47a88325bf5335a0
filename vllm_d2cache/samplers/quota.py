"""How many candidates a step commits, and which: fixed count, threshold, factor (d2cache.md, section 4)."""

from __future__ import annotations

import torch

from vllm_d2cache.records import OptionColumns


def choose_commits(score: torch.Tensor, candidates: torch.Tensor, options: OptionColumns) -> torch.Tensor:
    """Slots to commit: the best-scored candidates, as many as the request's rule says. Ties go to the lower slot.

    Args:
        score: [R, G] float32, any value where there is no candidate.
        candidates: [R, G] bool, masked slots of the current window whose rows were computed in this step.

    Returns:
        [R, G] bool, a subset of ``candidates``; not empty where there are candidates.
    """
    ordered, index = score.masked_fill(~candidates, -torch.inf).sort(dim=1, descending=True, stable=True)
    num_candidates = candidates.sum(1)
    rank = torch.arange(score.shape[1], device=score.device).unsqueeze(0)
    valid = rank < num_candidates.unsqueeze(1)

    over_threshold = (ordered >= options.threshold.unsqueeze(1)) & valid & (options.threshold > 0).unsqueeze(1)
    by_factor = _factor_count(ordered, valid, num_candidates, options.factor)
    count = torch.maximum(over_threshold.sum(1), by_factor)
    count = torch.minimum(torch.maximum(count, options.tokens_per_step), num_candidates)
    return torch.zeros_like(candidates).scatter_(1, index, rank < count.unsqueeze(1))


def _factor_count(
    ordered: torch.Tensor, valid: torch.Tensor, num_candidates: torch.Tensor, factor: torch.Tensor
) -> torch.Tensor:
    """[R] int64: one less than the smallest n with (n + 1)(1 - score_n) >= factor; without such n, one less than all.

    The last clause is an off-by-one of the published code, kept because its results were made with it.
    """
    n = torch.arange(1, ordered.shape[1] + 1, device=ordered.device).unsqueeze(0)
    stops = ((n + 1) * (1 - ordered) >= factor.unsqueeze(1)) & valid
    first = torch.where(stops.any(1), stops.to(torch.int8).argmax(1) + 1, num_candidates)
    return torch.where(factor > 0, first - 1, 0)
