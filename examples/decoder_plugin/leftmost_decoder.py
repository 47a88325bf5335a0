"""A decoder from outside the package: the leftmost masks first, ``run`` of them a step."""

from __future__ import annotations

from typing import ClassVar

from vllm_d2cache.decoders import Commits, Decoder, DecoderStep, Number


class LeftmostDecoder(Decoder):
    """Writes as a left-to-right model does, whatever the model is sure of."""

    name = "leftmost"
    options: ClassVar = {"run": Number(int, 1, note="tokens", default=1)}
    commits_many = True

    def choose(self, step: DecoderStep) -> Commits:
        """All requests of the step at once; each row of a tensor is a request and depends on that row alone."""
        place = step.candidates.cumsum(1)
        run = self.number("run", step.view.slots).unsqueeze(1)
        return Commits(step.candidates & (place <= run))
