"""Candidates ranked by score, and the best of them taken."""

from __future__ import annotations

import torch

from vllm_d2cache.ops.columns import columns
from vllm_d2cache.ops.dispatch import dispatched


def rank_candidates(score: torch.Tensor, candidates: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Candidates from the best down; ties go to the lower slot.

    Returns:
        Scores in that order [R, G], -inf behind the candidates; their slots [R, G]; which of both are candidates.
    """
    ordered, index = _ranked(score, candidates)
    return ordered, index, columns(score.shape[1], score.device) < candidates.sum(1, keepdim=True)


def _ranked(score: torch.Tensor, candidates: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.where(candidates, score, -torch.inf).sort(dim=1, descending=True, stable=True)


def take_best(index: torch.Tensor, candidates: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """[R, G] bool: the first ``count`` [R] slots of the ranking ``index``, of the candidates at most all."""
    first = columns(index.shape[1], index.device) < count.unsqueeze(1)
    return first.scatter(1, index, first).logical_and_(candidates)  # all of it is written over


@dispatched("vllm_d2cache.ops.triton.ranking")
def choose_commits(
    score: torch.Tensor,
    candidates: torch.Tensor,
    least: torch.Tensor,
    threshold: torch.Tensor | None,
    factor: torch.Tensor | None,
    single: bool = False,
) -> torch.Tensor:
    """Slots to commit: the best-scored candidates, as many as the rules say. Ties go to the lower slot.

    docs/methods/d2cache.md, section 4.

    Args:
        score: [R, G] float32, any value where there is no candidate.
        candidates: [R, G] bool.
        least: [R] int64, how many at least.
        threshold: [R] float32, also all with at least that score, 0 = off; None = off everywhere.
        factor: [R] float32, also as many as Fast-dLLM's factor rule allows, 0 = off; None = off everywhere.
        single: ``least`` is 1 everywhere. A kernel asks each one's anyway.

    Returns:
        [R, G] bool, a subset of ``candidates``; not empty where there are candidates.
    """
    if threshold is None and factor is None:
        if single:  # no ranking: of equals, the maximum is the leftmost
            best = torch.where(candidates, score, -torch.inf).max(1, keepdim=True).indices
            return (columns(candidates.shape[1], candidates.device) == best).logical_and_(candidates)
        return take_best(_ranked(score, candidates)[1], candidates, least)
    ordered, index, valid = rank_candidates(score, candidates)
    return take_best(index, candidates, allowed_count(ordered, valid, least, threshold, factor))


@dispatched("vllm_d2cache.ops.triton.ranking")
def choose_by_entropy(
    score: torch.Tensor, candidates: torch.Tensor, least: torch.Tensor, entropy: torch.Tensor, gamma: torch.Tensor
) -> torch.Tensor:
    """[R, G] bool: the longest head of the ranking whose entropies, less the largest of them, sum to at most gamma.

    The first candidate always passes, as its own entropy is the largest. Ben-Hamu et al., 2025.

    Args:
        score: [R, G] float32, any value where there is no candidate.
        candidates: [R, G] bool.
        least: [R] int64, how many at least.
        entropy: [R, G] float32, nats, not negative.
        gamma: [R] float32, nats.
    """
    _, index, valid = rank_candidates(score, candidates)
    # fp64: the sum of many small entropies must not depend on how it is added up.
    ordered = entropy.gather(1, index).double().masked_fill(~valid, 0.0)
    excess = ordered.cumsum(1) - ordered.cummax(1).values
    count = ((excess <= gamma.unsqueeze(1)) & valid).sum(1)
    return take_best(index, candidates, torch.maximum(count, least))


def allowed_count(
    ordered: torch.Tensor,
    valid: torch.Tensor,
    least: torch.Tensor,
    threshold: torch.Tensor | None,
    factor: torch.Tensor | None,
) -> torch.Tensor:
    """[R] int64: how many of the ranked candidates the rules let through; arguments as of :func:`choose_commits`."""
    count = least
    if threshold is not None:
        over = (ordered >= threshold.unsqueeze(1)) & valid & (threshold > 0).unsqueeze(1)
        count = torch.maximum(count, over.sum(1))
    if factor is not None:
        count = torch.maximum(count, _factor_count(ordered, valid, factor))
    return count


def _factor_count(ordered: torch.Tensor, valid: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """[R] int64: one less than the smallest n with (n + 1)(1 - score_n) >= factor; without such n, one less than all.

    The last clause is an off-by-one of the published code, kept because its results were made with it.
    """
    n = torch.arange(1, ordered.shape[1] + 1, device=ordered.device).unsqueeze(0)
    stops = ((n + 1) * (1 - ordered) >= factor.unsqueeze(1)) & valid
    first = torch.where(stops.any(1), stops.to(torch.int8).argmax(1) + 1, valid.sum(1))
    return torch.where(factor > 0, first - 1, 0)
