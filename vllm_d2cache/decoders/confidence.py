"""The default decoder: the best candidates, by fixed count, threshold or factor.

docs/methods/d2cache.md, section 4.
"""

from __future__ import annotations

from vllm_d2cache.decoders.base import Commits, Decoder, DecoderStep
from vllm_d2cache.decoders.grammar import GrammarDecoder
from vllm_d2cache.ops.ranking import choose_commits


class ConfidenceDecoder(Decoder):
    """Commits the best-scored candidates, as many as the request's rule says."""

    name = "confidence"
    reads = ("threshold", "factor", "score")
    takes_padding = True
    ordered = GrammarDecoder

    def choose(self, step: DecoderStep) -> Commits:
        """See :func:`ops.ranking.choose_commits`."""
        view = step.view
        return Commits(choose_commits(step.score, step.candidates, step.least, *view.rules, view.one_commit))
