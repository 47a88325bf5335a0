"""PC-sampler's debiasing: a rare token ranks above an equally confident common one (d2cache.md, section 2, step 4)."""

from __future__ import annotations

import torch

from vllm_d2cache.decoders.base import Decoder, DecoderResources, DecoderStep, rank_candidates, take_best
from vllm_d2cache.ops.row_stats import RowStats


class PcDecoder(Decoder):
    """Ranks by min(clip_alpha, -c ln f) for confidence c and corpus frequency f of the token; commits a fixed count."""

    name = "pc"
    option_names = ("clip_alpha",)

    def __init__(self, resources: DecoderResources) -> None:
        super().__init__(resources)
        assert resources.token_frequencies is not None, "refused where options are resolved"
        self._rarity = -(resources.token_frequencies.to(resources.device) + 1e-10).log()

    def rescore(self, stats: RowStats, score: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        """The debiased confidence [n]."""
        return torch.minimum(stats.confidence * self._rarity[stats.token], self.number("clip_alpha", slots))

    def choose(self, step: DecoderStep) -> torch.Tensor:
        """The best ``least``."""
        _, index, _ = rank_candidates(step.score, step.candidates)
        return take_best(index, step.candidates, step.least)
