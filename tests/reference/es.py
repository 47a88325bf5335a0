"""ES-dLLM in loops (docs/methods/other-caches.md, section 9.

Docs/policies.md for what differs): rows, who leaves, what is remembered.
"""

from __future__ import annotations

import math

import torch

from tests.reference.dense import DenseModel


class EarlySkip:
    """One request's forward passes."""

    def __init__(
        self,
        model: DenseModel,
        prompt_len: int,
        canvas_len: int,
        window: int,
        prompt_update_freq: int,
        block_update_freq: int,
        importance_score_alpha: float,
    ) -> None:
        self.model, self.prompt_len, self.canvas_len, self.window = model, prompt_len, canvas_len, window
        self.periods, self.alpha = (prompt_update_freq, block_update_freq), importance_score_alpha
        self.masked = list(range(canvas_len))
        self.committed: list[int] = []  # in the last step
        self.confidence: dict[int, float] = {}  # of masks that had logits
        self.states: dict[int, dict[int, torch.Tensor]] = {}  # exit layer -> position -> hidden state
        self.steps_in_window = -1
        self.start = 0

    def _rows(self) -> tuple[list[int], bool]:
        """Positions of the next step, and whether all stay; advances the clock."""
        p, shift = self.prompt_len, self.model.logit_shift
        first = len(self.masked) == self.canvas_len
        start = min(self.masked) // self.window * self.window
        self.steps_in_window = 0 if start != self.start else self.steps_in_window + 1
        self.start = start
        end = min(start + self.window, self.canvas_len)
        if first:
            return list(range(p + self.canvas_len)), True
        number = start + self.steps_in_window
        due = [number % period == 0 for period in self.periods]
        rows = set(range(p + start - shift, p + end))
        if self.steps_in_window == 0:
            rows |= set(range(p + min(self.committed), p + end))
        if due[0]:
            rows |= set(range(p + end))
        return sorted(rows), any(due)

    def forward(self, ids: torch.Tensor, positions: list[int]) -> tuple[torch.Tensor, list[int]]:
        """Final hidden states [n, d], and the positions whose rows have not left: only theirs mean anything."""
        model, layers = self.model, self.model.num_layers
        rows, all_stay = self._rows()
        assert positions == rows
        share = {math.ceil(layers / 8): 0.5}
        share[math.ceil(layers / 4)] = 0.25
        out = torch.full((len(rows), model.width), torch.nan)
        here, h = rows, model.w["embed"][ids]
        for i in range(layers):
            h, _ = model.layer(i, h, torch.tensor(here))
            if i not in share or i == layers - 1:
                continue
            old = self.states.setdefault(i, {})
            stay = here
            if not all_stay:
                count = max(int(share[i] * len(rows)), len(self.committed) + 2)
                score = self._scores(here, h, old)
                stay = sorted(sorted(here, key=lambda t: (-score[t], t))[:count])
            h = h[[here.index(t) for t in stay]]
            here = stay
            old.update(zip(here, h, strict=True))
        out[[rows.index(t) for t in here]] = model._norm(h, "norm")
        return out, here

    def _scores(self, here: list[int], h: torch.Tensor, old: dict[int, torch.Tensor]) -> dict[int, float]:
        p, shift = self.prompt_len, self.model.logit_shift
        change = []
        for t, state in zip(here, h, strict=True):
            norm = float(old[t].norm()) / math.sqrt(len(state)) + 1e-6
            change.append(float((state - old[t]).abs().mean()) / norm)
        largest = max(1.0, *change)
        masks = [g for g in self.masked if self.start <= g < self.start + self.window]
        best = sorted(masks, key=lambda g: (-self.confidence.get(g, 0.0), g))[:2]
        score = {}
        for t, moved in zip(here, change, strict=True):
            g = t + shift - p
            score[t] = (1 - self.alpha) * moved / largest
            if g in self.masked:
                score[t] += self.alpha * self.confidence.get(g, 0.0)
            score[t] += 2 * (g in best and self.alpha > 0) + 5 * (g == min(masks)) + 3.5 * (t - p in self.committed)
        return score

    def note(self, confidence: dict[int, float], committed: list[int]) -> None:
        """What became of the step: confidences of slots that had logits, and slots that got a token."""
        self.confidence |= confidence
        self.committed = committed
        self.masked = [g for g in self.masked if g not in committed]
