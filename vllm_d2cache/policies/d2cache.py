"""d2Cache's two-stage choice: masked positions about to be decided, and context that receives attention.

docs/methods/d2cache.md, sections 3.3 to 3.7, as published but for the decisions recorded in docs/architecture.md: each
request stands alone (no top-up, no batch-wide maxima), and the search window goes by the window's own length.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch

from vllm_d2cache.canvas.view import CanvasView, canvas_to_positions, positions_to_canvas
from vllm_d2cache.mechanisms.base import Worker
from vllm_d2cache.mechanisms.importance import Importance, ReadsImportance
from vllm_d2cache.ops.density import certainty_density
from vllm_d2cache.options.request import RequestOptions
from vllm_d2cache.options.types import Choice, Number
from vllm_d2cache.policies.base import CachePolicy, StepOutcome, StepPlan

FIRST, LATEST = MEMORIES = ("first", "latest")

# Wider than any gap in a text.
_WIDEST_GAP = 1 << 20

# Why a position waits for its refresh (D2CachePolicy.waiting).
_OWED_CONTEXT, _OWED_COMMIT = 1, 2


class D2CachePolicy(CachePolicy):
    """Certainty density chooses masked positions, attention rollout chooses the rest."""

    name = "d2cache"
    options: ClassVar = {
        "selection_sigma": Number(float, 0, note="positions; 0 = rank by confidence alone", default=10.0),
        "current_k": Number(int, 1, note="masked positions", default=32),
        "rollout_p": Number(float, 0, 1, note="share of the rollout's mass", default=0.1),
        "inflate_w": Number(int, 0, note="positions; 0 = off", default=0),
        "confidence_memory": Choice(MEMORIES, default=FIRST),
    }
    parallel_defaults: ClassVar = {"inflate_w": 4}
    uses = (ReadsImportance(),)

    def __init__(self, worker: Worker) -> None:
        super().__init__(worker)
        self.memory = torch.zeros(worker.num_slots, worker.max_len, device=worker.device)  # confidence by canvas slot
        # Positions chosen in an earlier step that the refresh budget put off, and why they had been chosen.
        self.waiting: torch.Tensor | None = None
        if self.refresh_budget is not None:
            self.waiting = torch.zeros(worker.num_slots, worker.max_len, dtype=torch.int8, device=worker.device)

    @staticmethod
    def max_rows(options: RequestOptions, prompt_len: int, canvas_len: int, refresh_budget: int | None) -> int:
        """current_k masked positions, the last commits, the rollout's share, and what inflation adds.

        The share: a prefix of a descending list with mass at most p cannot be longer than p times the list.
        """
        total = prompt_len + canvas_len
        chosen = min(options.value("current_k"), canvas_len) + options.most_commits(canvas_len)
        rows = min(total, chosen + max(1, math.ceil(options.value("rollout_p") * total)))
        if (width := options.value("inflate_w")) > 1:
            rows = min(total, rows * width)
        return rows if refresh_budget is None else min(rows, refresh_budget)

    def first_plan(self, view: CanvasView) -> StepPlan:
        """Everything, with the confidence of every slot: it is what the memory starts from."""
        if self.waiting is not None:
            self.waiting[view.slots] = 0
        return StepPlan(view.in_text, view.masked)

    def next_plan(self, view: CanvasView, outcome: StepOutcome) -> StepPlan:
        """Stage 1, the commits of this step, stage 2, inflation, and the budget if there is one."""
        selected = self._select_masked(view, outcome)
        stage_1 = canvas_to_positions(selected, view, self.logit_shift)
        certain = stage_1 | canvas_to_positions(outcome.committed, view)
        # The last prompt position, which a shifted family may have in stage 1, is a candidate of stage 2 all the same.
        share = _rollout_share(outcome.of(Importance).values, view.in_text & ~(certain & _behind_prompt(view)))
        chosen = certain | _head_of_mass(share, self.option("rollout_p", view).float())
        if self.logit_shift:
            chosen = self._assign_last_prompt_position(chosen, selected, view)
        refresh = _inflate(chosen, self.option("inflate_w", view).clamp(max=_WIDEST_GAP))
        if self.waiting is not None:
            refresh = self._fit_budget(refresh, chosen, stage_1, share, view, outcome)
        predictable = positions_to_canvas(refresh, view, self.logit_shift) & view.masked
        observe = predictable & self._latest(view).unsqueeze(1)
        return StepPlan(refresh, observe)

    def _select_masked(self, view: CanvasView, outcome: StepOutcome) -> torch.Tensor:
        """Stage 1 [R, G]: the current_k masked slots with the best confidence times density (section 3.3)."""
        width = view.masked.shape[1]
        memory = self._remember(view, outcome)
        known = ~view.masked & view.in_canvas
        score = memory * certainty_density(known, view.canvas_len, self.option("selection_sigma", view).float())
        score = score.masked_fill(~view.in_canvas, 0.0)
        start = outcome.window_start.unsqueeze(1)
        length = view.options.window.unsqueeze(1)
        slot = view.slot_index
        # A bonus of the best score puts the current window's slots before all others.
        in_window = (slot >= start) & (slot < start + length)
        score = score + in_window * score.amax(1, keepdim=True)

        remaining = view.open
        k = self.option("current_k", view).unsqueeze(1)
        # The search window ends with the window that holds the k-th remaining slot.
        kth = (remaining.cumsum(1) < k).sum(1, keepdim=True).clamp(max=width - 1)
        end = (kth // length + 1) * length - 1
        eligible = remaining & (slot >= start) & (slot <= end)
        index = score.masked_fill(~eligible, -torch.inf).argsort(dim=1, descending=True, stable=True)
        best = (slot < k).expand_as(index)
        return torch.zeros_like(eligible).scatter_(1, index, best) & eligible

    def _latest(self, view: CanvasView) -> torch.Tensor:
        """[R] bool: the memory follows the latest confidences."""
        return self.option("confidence_memory", view) == MEMORIES.index(LATEST)

    def _remember(self, view: CanvasView, outcome: StepOutcome) -> torch.Tensor:
        """[R, G] float32: the confidence memory after this step (section 3.7)."""
        width = view.masked.shape[1]
        update = outcome.predicted & (outcome.first | self._latest(view)).unsqueeze(1)
        previous = self.memory[view.slots, :width].masked_fill(outcome.first.unsqueeze(1), 0.0)
        memory = torch.where(update, outcome.score, previous)
        self.memory[view.slots, :width] = memory
        return memory

    def _assign_last_prompt_position(
        self, chosen: torch.Tensor, selected: torch.Tensor, view: CanvasView
    ) -> torch.Tensor:
        """Shifted families: the last prompt position serves slot 0 alone (section 3.5, point 3)."""
        last = (view.prompt_len - 1).unsqueeze(1)
        return torch.where(view.position == last, selected[:, :1], chosen)

    def _fit_budget(
        self,
        refresh: torch.Tensor,
        chosen: torch.Tensor,
        stage_1: torch.Tensor,
        share: torch.Tensor,
        view: CanvasView,
        outcome: StepOutcome,
    ) -> torch.Tensor:
        """Keep the ``refresh_budget`` most urgent positions; chosen ones that do not fit wait for the next step.

        Order: commits and their arrears, half a budget of stage 1, the arrears of stage 2, the rest of stage 1, then
        stage 2 by importance, then inflation. Arrears of stage 2 may not go before all of stage 1: new ones arrive
        in every step, and without masked positions nothing is ever committed.
        """
        assert self.waiting is not None
        assert self.refresh_budget is not None
        width = refresh.shape[1]
        waiting = self.waiting[view.slots, :width]
        commits = canvas_to_positions(outcome.committed, view) | (waiting == _OWED_COMMIT)
        owed = (waiting == _OWED_CONTEXT) & view.in_text
        ahead = stage_1 & (stage_1.cumsum(1) <= max(1, self.refresh_budget // 2))
        # The sum of what a position is; share < 1 orders the positions of one kind.
        urgency = share + chosen.float() + 2.0 * stage_1.float() + 4.0 * owed.float() + 8.0 * ahead.float()
        urgency = (urgency + 16.0 * commits.float()).masked_fill(~(refresh | owed | commits), -1.0)
        index = urgency.argsort(dim=1, descending=True, stable=True)
        rank = torch.arange(width, device=refresh.device).unsqueeze(0).expand_as(index)
        kept = torch.zeros_like(refresh).scatter_(1, index, rank < self.refresh_budget) & (urgency >= 0)
        # A masked position is chosen afresh every step; only known text is owed a refresh.
        left = (chosen | owed | commits) & ~kept & ~canvas_to_positions(view.masked, view)
        self.waiting[view.slots, :width] = torch.where(commits, _OWED_COMMIT, _OWED_CONTEXT).to(torch.int8) * left
        return kept


def _rollout_share(importance: torch.Tensor, candidates: torch.Tensor) -> torch.Tensor:
    """[R, T] float32: importance as a share of the candidates' total, 0 elsewhere (section 3.5, point 2)."""
    mass = torch.where(candidates, importance, 0.0)
    # A running sum adds in position order, so that padding does not change the rounding.
    total = mass.cumsum(1)[:, -1:]
    return mass / (total + 1e-9)


def _head_of_mass(share: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """[R, T] bool: the longest head of the descending list with mass at most p, and at least one position."""
    ordered, index = share.sort(dim=1, descending=True, stable=True)
    head = ordered.cumsum(1) <= p.unsqueeze(1)
    head |= (p >= 1).unsqueeze(1)
    head[:, 0] = True
    head &= ordered > 0
    return torch.zeros_like(head).scatter_(1, index, head)


def _inflate(chosen: torch.Tensor, width: torch.Tensor) -> torch.Tensor:
    """[R, T] bool with gaps of at most ``width`` [R] between consecutive members filled (section 3.5, point 4)."""
    position = torch.arange(chosen.shape[1], device=chosen.device).unsqueeze(0)
    far = 1 << 30
    before = torch.where(chosen, position, -far).cummax(1).values
    after = torch.where(chosen, position, far).flip(1).cummin(1).values.flip(1)
    return chosen | (after - before <= width.unsqueeze(1))


def _behind_prompt(view: CanvasView) -> torch.Tensor:
    """[R, T] bool: the position is at or behind the first canvas slot."""
    return view.position >= view.prompt_len.unsqueeze(1)
