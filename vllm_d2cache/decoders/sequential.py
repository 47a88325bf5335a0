"""From left to right: each step commits the leftmost masks (docs/decoders.md)."""

from __future__ import annotations

from vllm_d2cache.decoders.base import Commits, Decoder, DecoderStep
from vllm_d2cache.decoders.grammar import GrammarDecoder


class SequentialDecoder(Decoder):
    """Commits the leftmost candidates, as many as the request's count or its steps say."""

    name = "sequential"
    takes_padding = True
    ordered = GrammarDecoder

    def choose(self, step: DecoderStep) -> Commits:
        """The first ``least`` candidates."""
        place = step.candidates.cumsum(1)
        return Commits(step.candidates & (place <= step.least.unsqueeze(1)))
