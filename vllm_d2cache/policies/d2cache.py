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
from vllm_d2cache.ops.columns import FirstColumns
from vllm_d2cache.ops.density import certainty_density
from vllm_d2cache.ops.refresh_choice import Outcome, choose_refresh, inflate, select_context, select_masked
from vllm_d2cache.options.request import RequestOptions
from vllm_d2cache.policies.base import CachePolicy, StepOutcome, StepPlan
from vllm_d2cache.policies.d2cache_blocks import D2CacheInBlocks
from vllm_d2cache.policies.d2cache_options import LATEST, MEMORIES, OPTIONS

# Why a position waits for its refresh (D2CachePolicy.waiting).
_OWED_CONTEXT, _OWED_COMMIT = 1, 2


class D2CachePolicy(CachePolicy):
    """Certainty density chooses masked positions, attention rollout chooses the rest."""

    name = "d2cache"
    options: ClassVar = OPTIONS
    parallel_defaults: ClassVar = {"inflate_w": 4}
    uses = (ReadsImportance(),)
    in_blocks = D2CacheInBlocks

    def __init__(self, worker: Worker) -> None:
        super().__init__(worker)
        self.memory = torch.zeros(worker.num_slots, worker.max_len, device=worker.device)  # confidence by canvas slot
        self._first_columns = FirstColumns()
        # Slots whose latest request of this policy ranks by another density than it commits with.
        self._rank_apart: set[int] = set()
        # And that inflates, or whose memory follows the latest confidences.
        self._inflates: set[int] = set()
        self._follows: set[int] = set()
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

    def start(self, slot: int, options: RequestOptions) -> None:
        super().start(slot, options)
        for slots, on in (
            (self._rank_apart, options.value("selection_sigma") != options.sigma),
            (self._inflates, options.value("inflate_w") > 1),
            (self._follows, options.value("confidence_memory") == LATEST),
        ):
            (slots.add if on else slots.discard)(slot)

    def first_plan(self, view: CanvasView) -> StepPlan:
        """Everything, with the confidence of every slot: it is what the memory starts from."""
        if self.waiting is not None:
            self.waiting[view.slots] = 0
        return StepPlan(view.in_text, view.masked)

    def next_plan(self, view: CanvasView, outcome: StepOutcome) -> StepPlan:
        """Stage 1, the commits of this step, stage 2, inflation, and the budget if there is one."""
        column = self._options.columns
        integers, _, masked, live = view.texts
        if self._rank_apart:
            sigma = self.option("selection_sigma", view).float()
            density = certainty_density(masked, view.canvas_len, sigma, masks=True)
        else:
            density = view.prior
        found = Outcome(outcome.predicted, outcome.score, outcome.first, outcome.window_start)
        (kept,) = self._first_columns.of(masked.shape[1], self.memory)
        memory = (kept, column["confidence_memory"], column["current_k"])
        follows = bool(self._follows)
        known = (follows, outcome.fresh, view.one_window)
        selected = select_masked(view.slots, *memory, density, integers, masked, live, found, *known)
        importance = outcome.of(Importance).values
        if self.waiting is not None:
            return self._within_budget(importance, selected, view, outcome)
        numbers = (column["rollout_p"], column["inflate_w"], column["confidence_memory"], self.logit_shift)
        refresh, observe = choose_refresh(
            view.slots,
            importance,
            selected,
            outcome.committed,
            masked,
            integers,
            *numbers,
            bool(self._inflates),
            follows,
        )
        return StepPlan(refresh, observe if follows else None)

    def _within_budget(
        self, importance: torch.Tensor, selected: torch.Tensor, view: CanvasView, outcome: StepOutcome
    ) -> StepPlan:
        """As ops.refresh_choice.choose_refresh, then what the budget has room for."""
        shift = self.logit_shift
        stage_1 = canvas_to_positions(selected, view, shift)
        certain = stage_1 | canvas_to_positions(outcome.committed, view)
        p = self.option("rollout_p", view).float()
        chosen, share = select_context(importance, certain, selected, view.texts.integers, p, shift)
        refresh = inflate(chosen, self.option("inflate_w", view))
        refresh = self._fit_budget(refresh, chosen, stage_1, share, view, outcome)
        predictable = positions_to_canvas(refresh, view, shift) & view.masked
        latest = self.option("confidence_memory", view) == MEMORIES.index(LATEST)
        return StepPlan(refresh, predictable & latest.unsqueeze(1))

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
