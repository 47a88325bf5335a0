"""The default decoder: the best candidates, by fixed count, threshold or factor.

docs/methods/d2cache.md, section 4.
"""

from __future__ import annotations

import torch

from vllm_d2cache.canvas.view import OptionColumns
from vllm_d2cache.decoders.base import Commits, Decoder, DecoderStep, rank_candidates, take_best
from vllm_d2cache.decoders.grammar import GrammarDecoder


class ConfidenceDecoder(Decoder):
    """Commits the best-scored candidates, as many as the request's rule says."""

    name = "confidence"
    reads = ("threshold", "factor", "score")
    takes_padding = True
    ordered = GrammarDecoder

    def choose(self, step: DecoderStep) -> Commits:
        """See :func:`choose_commits`."""
        return Commits(choose_commits(step.score, step.candidates, step.view.options, step.least))


def choose_commits(
    score: torch.Tensor, candidates: torch.Tensor, options: OptionColumns, least: torch.Tensor
) -> torch.Tensor:
    """Slots to commit: the best-scored candidates, as many as the request's rule says. Ties go to the lower slot.

    Args:
        score: [R, G] float32, any value where there is no candidate.
        candidates: [R, G] bool, masked slots of the current window whose rows were computed in this step.
        least: [R] int64, how many at least.

    Returns:
        [R, G] bool, a subset of ``candidates``; not empty where there are candidates.
    """
    ordered, index, valid = rank_candidates(score, candidates)
    count = allowed_count(ordered, valid, options)
    return take_best(index, candidates, torch.maximum(count, least))


def allowed_count(ordered: torch.Tensor, valid: torch.Tensor, options: OptionColumns) -> torch.Tensor:
    """[R] int64: how many of the ranked candidates the threshold or the factor rule lets through; 0 without a rule."""
    over_threshold = (ordered >= options.threshold.unsqueeze(1)) & valid & (options.threshold > 0).unsqueeze(1)
    return torch.maximum(over_threshold.sum(1), _factor_count(ordered, valid, options.factor))


def _factor_count(ordered: torch.Tensor, valid: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """[R] int64: one less than the smallest n with (n + 1)(1 - score_n) >= factor; without such n, one less than all.

    The last clause is an off-by-one of the published code, kept because its results were made with it.
    """
    n = torch.arange(1, ordered.shape[1] + 1, device=ordered.device).unsqueeze(0)
    stops = ((n + 1) * (1 - ordered) >= factor.unsqueeze(1)) & valid
    first = torch.where(stops.any(1), stops.to(torch.int8).argmax(1) + 1, valid.sum(1))
    return torch.where(factor > 0, first - 1, 0)
