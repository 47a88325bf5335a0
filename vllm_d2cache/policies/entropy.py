"""EntropyCache: the uncertainty of the tokens just committed says whether the cache is still good.

docs/methods/other-caches.md, section 7. No code has been published; docs/policies.md has what had to be chosen.
"""

from __future__ import annotations

from typing import ClassVar

import torch

from vllm_d2cache.canvas.view import CanvasView, canvas_to_positions
from vllm_d2cache.mechanisms.base import Worker
from vllm_d2cache.options.types import Number
from vllm_d2cache.policies.base import CachePolicy, StepOutcome, StepPlan


class EntropyPolicy(CachePolicy):
    """Everything after a commit of entropy above ``entropy_tau``, else the window's masks and the latest commits.

    The latest commits are the ``entropy_k`` last ones in the order of commitment, and all of the last step's, so that
    no token keeps the K and V of its mask.
    """

    name = "entropy"
    options: ClassVar = {
        "entropy_tau": Number(float, 0, note="nats", default=1.0),
        "entropy_k": Number(int, 0, note="tokens", default=8),
    }
    defaults: ClassVar = {"window": 32, "sigma": 0.0}
    reads_entropy = True

    def __init__(self, worker: Worker) -> None:
        super().__init__(worker)
        # By canvas slot: the number of the step that committed it, 0 for none.
        self.committed_in = torch.zeros(worker.num_slots, worker.max_len, dtype=torch.int64, device=worker.device)

    def first_plan(self, view: CanvasView) -> StepPlan:
        """Everything."""
        self.committed_in[view.slots] = 0
        return super().first_plan(view)

    def next_plan(self, view: CanvasView, outcome: StepOutcome) -> StepPlan:
        """Everything after an uncertain commit, else what has changed of late."""
        assert outcome.entropy is not None
        entropy = outcome.entropy.masked_fill(~outcome.committed, 0.0).amax(1)
        uncertain = entropy > self.option("entropy_tau", view)
        masked = view.masked & view.in_window
        latest = canvas_to_positions(self._latest(view, outcome), view)
        partial = canvas_to_positions(masked, view) | self.read_from(masked, view) | latest
        return StepPlan(torch.where(uncertain.unsqueeze(1), view.in_text, partial))

    def _latest(self, view: CanvasView, outcome: StepOutcome) -> torch.Tensor:
        """[R, G] bool: the last commits. Ties in the order of commitment go to the lower slot."""
        width = view.masked.shape[1]
        # The next step's number is the last one's, counted from 1.
        when = torch.where(outcome.committed, view.step.unsqueeze(1), self.committed_in[view.slots, :width])
        self.committed_in[view.slots, :width] = when
        index = when.argsort(dim=1, descending=True, stable=True)
        first_k = (view.slot_index < self.option("entropy_k", view).unsqueeze(1)).expand_as(index)
        recent = torch.zeros_like(outcome.committed).scatter_(1, index, first_k)
        return (recent & (when > 0)) | outcome.committed
