"""Committed tokens of the window are asked about: masks in their places, beside the text (ops/shadow_attention.py)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from vllm_d2cache.canvas.rows import ExtraRows, StepRows
from vllm_d2cache.canvas.states import CanvasStates
from vllm_d2cache.mechanisms.base import FRESH, KEYS, ROWS, Ask, Finding, Hook, Mechanism, Members, Use, Worker
from vllm_d2cache.ops.paged_attention import PagedLayout
from vllm_d2cache.ops.shadow_attention import ShadowRows, shadow_attention


@dataclass(frozen=True)
class VerifiesByShadows(Use):
    """In every step the probability of the tokens in the current window is found out."""

    name: ClassVar[str] = "verification by shadows"
    needs: ClassVar[frozenset[str]] = frozenset({KEYS, ROWS, FRESH})

    def make(self, worker: Worker) -> Shadows:
        return Shadows(worker)

    def extra_rows(self, window: int) -> int:
        """One for each slot of the window."""
        return window


@dataclass(frozen=True)
class Verified(Finding):
    """Of committed slots, how probable their tokens are as seen from everywhere but their own places."""

    slots: torch.Tensor  # [R, G] bool
    probability: torch.Tensor  # [R, G] float32; only where ``slots``


class Shadows(Mechanism):
    """Keeps nothing from step to step."""

    def open(self, rows: StepRows, members: Members, canvas: CanvasStates) -> ShadowHook:
        """Waits for the device once: how many shadows there are."""
        view, device = rows.view, rows.view.slots.device
        verified = view.in_window & ~view.masked
        if (mine := members.flags(len(rows.slots), device)) is not None:
            verified = verified & mine.unsqueeze(1)
        shadowed = view.in_window & verified.any(1, keepdim=True)
        counts, verifies = torch.stack([shadowed.sum(1), verified.sum(1)]).tolist()
        owner, place = shadowed.nonzero_static(size=sum(counts)).unbind(1)
        who, slot = verified.nonzero_static(size=sum(verifies)).unbind(1)
        # A slot is read where its family reads it: from the shadow, of a shifted family from that on the left; the
        # window's first slot then has none, and is read from the text.
        source = slot - canvas.traits.logit_shift
        shadow_of = shadowed.flatten().cumsum(0).view(shadowed.shape) - 1
        in_shadow = source >= view.window_start[who]
        text_row = rows.row_of[who, view.prompt_len[who] + source]
        shadow_row = rows.request.shape[0] + shadow_of[who, source.clamp(min=0)]
        positions = view.prompt_len[owner] + place
        masks = torch.full(positions.shape, canvas.traits.mask_token_id, dtype=torch.int32, device=device)
        hook = ShadowHook(verified, who, slot, canvas.tokens[view.slots[who], view.prompt_len[who] + slot].long())
        logits_rows = torch.where(in_shadow, shadow_row, text_row)
        if len(who):
            hook.extra = ExtraRows(counts, positions, masks, logits_rows)
        return hook


@dataclass
class ShadowHook(Hook):
    """The shadows of one forward pass."""

    verified: torch.Tensor  # [R, G] bool
    who: torch.Tensor  # [v] int64, request of each verified slot
    slot: torch.Tensor  # [v] int64
    token: torch.Tensor  # [v] int64, what stands there
    probability: torch.Tensor | None = None  # [v] float32

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        layout: PagedLayout,
        scale: float,
        output: torch.Tensor,
    ) -> None:
        assert self.extra is not None
        shadows = ShadowRows(self.extra.counts, self.extra.positions)
        shadow_attention(query, key, value, kv_cache, layout, shadows, scale, output)

    def read(self, hidden: torch.Tensor, ask: Ask) -> None:
        self.probability = ask(hidden, self.who, self.slot, self.token)

    def result(self, num_positions: int) -> Verified:
        table = torch.zeros(self.verified.shape, device=self.verified.device)
        if self.probability is not None:
            table[self.who, self.slot] = self.probability
        return Verified(self.verified, table)
