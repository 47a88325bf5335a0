"""WINO: draft widely, verify what was drafted, take back what fails (d2cache.md, section 4)."""

from __future__ import annotations

import torch

from vllm_d2cache.decoders.base import Decoder, DecoderStep, rank_candidates, take_best

# Drafts in a step: 7 in 10 of the masks left in the window, but not fewer than 5 and not more than 20.
_DRAFT_TENTHS, _FEWEST, _MOST = 7, 5, 20


class WinoDecoder(Decoder):
    """Commits all over ``wide_in_thres``; masks again what its shadow gives less than ``narrow_out_thres``.

    In every step fewer slots are taken back than are drafted, so a window is done in at most as many steps as it has
    slots. Slots of the current window may be taken back, those of windows that are done may not: no more is emitted.
    """

    name = "wino"
    verifies = True
    option_names = ("wide_in_thres", "narrow_out_thres")

    def choose(self, step: DecoderStep) -> torch.Tensor:
        """The draft: the best candidates over the wide threshold, up to the cap."""
        ordered, index, valid = rank_candidates(step.score, step.candidates)
        wide = self.number("wide_in_thres", step.view.slots).unsqueeze(1)
        over = ((ordered >= wide) & valid).sum(1)
        cap = (step.candidates.sum(1) * _DRAFT_TENTHS // 10).clamp(min=_FEWEST, max=_MOST)
        return take_best(index, step.candidates, torch.maximum(torch.minimum(over, cap), step.least))

    def revoke(self, step: DecoderStep, committed: torch.Tensor) -> torch.Tensor:
        """The least probable of the verified slots under the narrow threshold, fewer than were drafted."""
        assert step.shadow_probability is not None
        narrow = self.number("narrow_out_thres", step.view.slots).unsqueeze(1)
        doubted = step.verified & (step.shadow_probability < narrow)
        _, index, _ = rank_candidates(-step.shadow_probability, doubted)
        return take_best(index, doubted, (committed.sum(1) - step.least).clamp(min=0))
