"""The statistic by which candidates are ranked."""

from __future__ import annotations

import torch

from vllm_d2cache.ops.row_stats import RowStats
from vllm_d2cache.options.request import SCORES


def ranking_score(stats: RowStats, score: torch.Tensor, who: torch.Tensor) -> torch.Tensor:
    """One number in [0, 1] a row, higher is surer.

    The negative entropy of the published code changes sign under a certainty prior: the prior then prefers slots far
    from any text. exp(-entropy) ranks the same and stays positive, so a prior, a threshold and a factor keep their
    meaning.

    Args:
        stats: statistics of n rows.
        score: [R] int64, index into options.request.SCORES.
        who: [n] int64, request of each row.

    Returns:
        [n] float32.
    """
    result = stats.confidence
    if stats.margin is None and stats.entropy is None:
        return result
    score = score[who]
    if stats.margin is not None:
        result = torch.where(score == SCORES.index("margin"), stats.margin, result)
    if stats.entropy is not None:
        result = torch.where(score == SCORES.index("entropy"), (-stats.entropy).exp(), result)
    return result
