"""EB-sampler: as many tokens as keep the entropy of the step bounded (Ben-Hamu et al., 2025).

docs/methods/d2cache.md, section 4.
"""

from __future__ import annotations

from typing import ClassVar

from vllm_d2cache.decoders.base import Commits, Decoder, DecoderStep
from vllm_d2cache.ops.ranking import choose_by_entropy
from vllm_d2cache.options.types import Number


class EbDecoder(Decoder):
    """Commits the longest head of the ranking whose entropies, less the largest of them, sum to at most gamma."""

    name = "eb"
    options: ClassVar = {
        "gamma": Number(float, 0, note="nats", default=0.001),
    }
    reads = ("score",)
    commits_many = True
    takes_padding = True
    reads_entropy = True

    def choose(self, step: DecoderStep) -> Commits:
        """The head of the ranking by score."""
        assert step.entropy is not None
        gamma = self.number("gamma", step.view.slots)
        return Commits(choose_by_entropy(step.score, step.candidates, step.least, step.entropy, gamma))
