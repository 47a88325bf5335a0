"""Decoders that look at where confident slots lie: hierarchical and LocalLeap.

docs/methods/other-caches.md, sections 6.4 and 13.
"""

from __future__ import annotations

from typing import ClassVar

import torch

from vllm_d2cache.decoders.base import Commits, Decoder, DecoderStep, rank_candidates, take_best
from vllm_d2cache.options.types import Number


def _best(step: DecoderStep) -> torch.Tensor:
    """[R, G] bool: the best ``least`` candidates."""
    _, index, _ = rank_candidates(step.score, step.candidates)
    return take_best(index, step.candidates, step.least)


class HierarchicalDecoder(Decoder):
    """Splits every run of masks at its most confident slot, and commits what is over the threshold.

    A run's leader needs a score above ``low_threshold``, any other candidate one above ``threshold``.
    """

    name = "hierarchical"
    options: ClassVar = {
        "low_threshold": Number(float, 0, 1, default=0.4),
    }
    reads = ("threshold", "score")
    commits_many = True
    default_threshold = 0.9

    def choose(self, step: DecoderStep) -> Commits:
        """Leaders, sure candidates, and the best ``least`` in any case."""
        view = step.view
        low = self.number("low_threshold", view.slots).unsqueeze(1)
        threshold = view.options.threshold.unsqueeze(1)
        leaders = run_leaders(view.masked & view.in_window, step.candidates, step.score)
        sure = (leaders & (step.score > low)) | (step.candidates & (step.score > threshold))
        return Commits(sure | _best(step))


def run_leaders(open_slots: torch.Tensor, candidates: torch.Tensor, score: torch.Tensor) -> torch.Tensor:
    """[R, G] bool: the best-scored candidate of each maximal run of ``open_slots``; ties go to the lower slot.

    Args:
        open_slots: [R, G] bool.
        candidates: [R, G] bool, a subset of ``open_slots``.
        score: [R, G] float32, any value where there is no candidate.
    """
    before = torch.nn.functional.pad(open_slots, (1, 0))[:, :-1]
    run = (open_slots & ~before).cumsum(1)  # 0 before the first run
    size = (*score.shape[:1], score.shape[1] + 1)
    score = score.masked_fill(~candidates, -torch.inf)
    best = score.new_full(size, -torch.inf).scatter_reduce(1, run, score, "amax").gather(1, run)
    slot = torch.arange(score.shape[1], device=score.device).expand_as(score)
    tied = candidates & (score == best)
    lowest = slot.new_full(size, score.shape[1]).scatter_reduce(1, run, slot.masked_fill(~tied, score.shape[1]), "amin")
    return candidates & (slot == lowest.gather(1, run))


class LocalLeapDecoder(Decoder):
    """Around an anchor, a candidate that reaches ``threshold``, the others need only reach ``leap_threshold``."""

    name = "localleap"
    options: ClassVar = {
        "leap_threshold": Number(float, 0, 1, default=0.75),
        "leap_radius": Number(int, 0, note="positions", default=4),
    }
    reads = ("threshold", "score")
    commits_many = True
    default_threshold = 0.9

    def choose(self, step: DecoderStep) -> Commits:
        """Anchors, their confident neighbours, and the best ``least`` in any case."""
        slots = step.view.slots
        relaxed = self.number("leap_threshold", slots).unsqueeze(1)
        radius = self.number("leap_radius", slots).unsqueeze(1)
        anchors = step.candidates & (step.score >= step.view.options.threshold.unsqueeze(1))
        near = _distance(anchors) <= radius
        return Commits(anchors | (step.candidates & near & (step.score >= relaxed)) | _best(step))


def _distance(anchors: torch.Tensor) -> torch.Tensor:
    """[R, G] float32: slots to the nearest anchor on either side; infinite where there is none."""
    slot = torch.arange(anchors.shape[1], device=anchors.device).float().expand(anchors.shape)
    left = slot.masked_fill(~anchors, -torch.inf).cummax(1).values
    right = slot.masked_fill(~anchors, torch.inf).flip(1).cummin(1).values.flip(1)
    return torch.minimum(slot - left, right - slot)
