"""A cache policy with a mechanism of its own: it looks into the layers for what it wants to know.

Keys of small norm tend to receive much attention (Devoto et al., 2024, arXiv 2406.11430, who keep them when they
compress a KV cache). Here they are what a step recomputes beside its window. An example, not a recommendation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from vllm_d2cache.mechanisms import KEYS, ROWS, Finding, Hook, Mechanism, Use
from vllm_d2cache.ops.paged_attention import PagedLayout, read_kv
from vllm_d2cache.policies import (
    CachePolicy,
    CanvasView,
    Number,
    RequestOptions,
    StepOutcome,
    StepPlan,
    canvas_to_positions,
)


@dataclass(frozen=True)
class ReadsKeyNorms(Use):
    """Norms of all keys are taken in every step. On one rank alone: others hold other heads."""

    name: ClassVar[str] = "key norms"
    needs: ClassVar[frozenset[str]] = frozenset({KEYS, ROWS})

    def make(self, worker: Any) -> KeyNorms:
        """Called for the first request that uses it."""
        return KeyNorms(worker)


@dataclass(frozen=True)
class Norms(Finding):
    """[R, T] float32: norm of each position's keys, summed over layers and heads; 0 for others' requests."""

    values: torch.Tensor

    def select(self, rows: torch.Tensor) -> Norms:
        """Those of some requests of the step."""
        return Norms(self.values[rows])


class KeyNorms(Mechanism):
    """Nothing is kept from step to step; what is would be made in ``allocate`` and given up in ``release``."""

    def open(self, rows: Any, members: dict[int, Use], canvas: Any) -> NormHook:
        """A hook of its own for each step."""
        return NormHook(list(members), torch.zeros(len(rows.slots), rows.view.num_positions, device=canvas.device))


@dataclass
class NormHook(Hook):
    """One forward pass."""

    members: list[int]
    norms: torch.Tensor

    def before_attention(
        self, query: torch.Tensor, kv_cache: torch.Tensor, scale: float, layout: PagedLayout
    ) -> PagedLayout:
        """Called in every layer, when fresh K and V are in the cache."""
        for r in self.members:
            key, _ = read_kv(kv_cache, layout, r)  # [kv heads, T, head size]
            self.norms[r, : key.shape[1]] += key.float().norm(dim=2).sum(0)
        return layout

    def result(self, num_positions: int) -> Norms:
        """Called when all layers are over."""
        return Norms(self.norms)


class KeyNormPolicy(CachePolicy):
    """Recomputes the window, and the ``smallest`` positions whose keys have the smallest norms."""

    name = "key_norm"
    options: ClassVar = {"smallest": Number(int, 0, note="positions", default=16)}
    defaults: ClassVar = {"window": 32, "sigma": 0.0}
    uses = (ReadsKeyNorms(),)

    @staticmethod
    def max_rows(options: RequestOptions, prompt_len: int, canvas_len: int, refresh_budget: int | None) -> int:
        """The window, in a shifted family the position before it, the last commits, and the smallest."""
        rows = options.window_length(canvas_len) + 1 + options.most_commits(canvas_len) + options.value("smallest")
        return min(prompt_len + canvas_len, rows)

    def next_plan(self, view: CanvasView, outcome: StepOutcome) -> StepPlan:
        """Ties go to the lower position."""
        window = self.read_from(view.in_window, view)
        norms = outcome.of(Norms).values.masked_fill(~view.in_text, torch.inf)
        order = norms.argsort(dim=1, stable=True)
        smallest = (view.position < self.option("smallest", view).unsqueeze(1)).expand_as(order)
        chosen = torch.zeros_like(window).scatter_(1, order, smallest) & view.in_text
        fresh = canvas_to_positions(view.in_window | outcome.committed, view)
        return StepPlan(window | fresh | chosen)
