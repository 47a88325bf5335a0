"""WINO: draft widely, verify what was drafted, take back what fails (docs/methods/d2cache.md, section 4)."""

from __future__ import annotations

from typing import ClassVar

import torch

from vllm_d2cache.decoders.base import Commits, Decoder, DecoderStep, rank_candidates, take_best
from vllm_d2cache.mechanisms.base import finding
from vllm_d2cache.mechanisms.shadows import Verified, VerifiesByShadows
from vllm_d2cache.options.types import Number

# Drafts in a step: 7 in 10 of the masks left in the window, but not fewer than 5 and not more than 20.
_DRAFT_TENTHS, _FEWEST, _MOST = 7, 5, 20


class WinoDecoder(Decoder):
    """Commits all over ``wide_in_thres``; masks again what its shadow gives less than ``narrow_out_thres``.

    In every step fewer slots are taken back than are drafted, so a window is done in at most as many steps as it has
    slots. Slots of the current window may be taken back, those of windows that are done may not: no more is emitted.
    """

    name = "wino"
    options: ClassVar = {
        "wide_in_thres": Number(float, 0, 1, default=0.7),
        "narrow_out_thres": Number(float, 0, 1, default=0.9),
    }
    commits_many = True
    revokes = True
    uses = (VerifiesByShadows(),)

    def choose(self, step: DecoderStep) -> Commits:
        """The draft, and what is taken back of what was drafted before."""
        drafted = self._draft(step)
        return Commits(drafted, revoked=self._revoke(step, drafted))

    def _draft(self, step: DecoderStep) -> torch.Tensor:
        """[R, G] bool: the best candidates over the wide threshold, up to the cap."""
        ordered, index, valid = rank_candidates(step.score, step.candidates)
        wide = self.number("wide_in_thres", step.view.slots).unsqueeze(1)
        over = ((ordered >= wide) & valid).sum(1)
        cap = (step.candidates.sum(1) * _DRAFT_TENTHS // 10).clamp(min=_FEWEST, max=_MOST)
        return take_best(index, step.candidates, torch.maximum(torch.minimum(over, cap), step.least))

    def _revoke(self, step: DecoderStep, drafted: torch.Tensor) -> torch.Tensor:
        """[R, G] bool: the least probable of the verified slots under the narrow threshold, fewer than were drafted."""
        verified = finding(step.found, Verified)
        narrow = self.number("narrow_out_thres", step.view.slots).unsqueeze(1)
        doubted = verified.slots & (verified.probability < narrow)
        _, index, _ = rank_candidates(-verified.probability, doubted)
        return take_best(index, doubted, (drafted.sum(1) - step.least).clamp(min=0))
