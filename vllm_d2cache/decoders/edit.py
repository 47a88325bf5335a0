"""Draft and edit: masks become tokens over one threshold, tokens of the window become others over a second one.

The decoding of LLaDA2.1 (docs/models.md, docs/decoders.md).
"""

from __future__ import annotations

from typing import ClassVar

import torch

from vllm_d2cache.canvas.request import Request
from vllm_d2cache.decoders.base import Commits, Decoder, DecoderStep
from vllm_d2cache.mechanisms.base import Worker
from vllm_d2cache.ops.ranking import choose_commits
from vllm_d2cache.options.types import Number


class EditDecoder(Decoder):
    """Drafts as ``confidence`` does, and writes over what it now predicts otherwise with enough confidence.

    A window is over with a step that has computed all of it and changes nothing, or when it has been looked at
    ``max_post_steps`` times since its last mask was filled.
    """

    name = "edit"
    options: ClassVar = {
        "editing_threshold": Number(float, 0, 1, default=0.9),
        "max_post_steps": Number(int, 0, note="steps of a window without masks", default=16),
    }
    reads = ("threshold", "factor", "score")
    revises = True
    takes_padding = True

    def __init__(self, worker: Worker) -> None:
        super().__init__(worker)
        # Steps of the current window since its last mask was filled.
        self._looks = torch.zeros(worker.num_slots, dtype=torch.int64, device=worker.device)

    def start(self, slot: int, request: Request) -> None:
        """No window has been filled."""
        super().start(slot, request)
        self._looks[slot] = 0

    def choose(self, step: DecoderStep) -> Commits:
        """Drafts of the masks, edits of all other slots of the window, and whether it stays open."""
        view, slots = step.view, step.view.slots
        drafted = choose_commits(step.score, step.candidates, step.least, *view.rules)
        bound = self.number("editing_threshold", slots).unsqueeze(1)
        masks = view.masked & view.in_window
        seen = torch.zeros_like(masks) if step.predicted is None else step.predicted & view.in_window & ~masks
        edited = seen if step.standing is None else seen & (step.token != step.standing) & (step.score > bound)
        had_masks, full = masks.any(1), ~(masks & ~drafted).any(1)
        looks = torch.where(had_masks, 0, self._looks[slots] + 1)
        self._looks[slots] = looks
        most = self._options.columns["max_post_steps"][slots]
        quiet = ~had_masks & ~(edited | (view.in_window & ~seen)).any(1)
        return Commits(drafted, revised=edited, held=full & ~quiet & (looks < most))
