"""PC-sampler's debiasing: a rare token ranks above an equally confident common one.

docs/methods/d2cache.md, section 2, step 4.
"""

from __future__ import annotations

from typing import ClassVar

import torch

from vllm_d2cache.decoders.base import Commits, Decoder, DecoderStep, rank_candidates, take_best
from vllm_d2cache.decoders.frequencies import load_frequencies
from vllm_d2cache.mechanisms.base import Worker
from vllm_d2cache.ops.row_stats import RowStats
from vllm_d2cache.options.types import Number


class PcDecoder(Decoder):
    """Ranks by min(clip_alpha, -c ln f) for confidence c and corpus frequency f of the token; commits a fixed count."""

    name = "pc"
    needs_server = ("token_frequencies",)
    options: ClassVar = {
        "clip_alpha": Number(float, 0, open_low=True, default=10.0),
    }

    def __init__(self, worker: Worker) -> None:
        super().__init__(worker)
        path = worker.server.token_frequencies
        # Without a table there is no request: requests/resolve.py refuses it.
        table = torch.ones(1) if path is None else torch.from_numpy(load_frequencies(path))
        self._rarity = -(table.to(worker.device) + 1e-10).log()

    def rescore(self, stats: RowStats, score: torch.Tensor, slots: torch.Tensor, who: torch.Tensor) -> torch.Tensor:
        """The debiased confidence [n]."""
        return torch.minimum(stats.confidence * self._rarity[stats.token], self.number("clip_alpha", slots[who]))

    def choose(self, step: DecoderStep) -> Commits:
        """The best ``least``."""
        _, index, _ = rank_candidates(step.score, step.candidates)
        return Commits(take_best(index, step.candidates, step.least))
