"""EB-sampler: as many tokens as keep the entropy of the step bounded (Ben-Hamu et al., 2025).

docs/methods/d2cache.md, section 4.
"""

from __future__ import annotations

from typing import ClassVar

import torch

from vllm_d2cache.decoders.base import Commits, Decoder, DecoderStep, rank_candidates, take_best
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
        """The head of the ranking by score; the first candidate always passes, as its own entropy is the largest."""
        assert step.entropy is not None
        _, index, valid = rank_candidates(step.score, step.candidates)
        # fp64: the sum of many small entropies must not depend on how it is added up.
        entropy = step.entropy.gather(1, index).double().masked_fill(~valid, 0.0)
        excess = entropy.cumsum(1) - entropy.cummax(1).values
        gamma = self.number("gamma", step.view.slots).unsqueeze(1)
        count = ((excess <= gamma) & valid).sum(1)
        return Commits(take_best(index, step.candidates, torch.maximum(count, step.least)))
