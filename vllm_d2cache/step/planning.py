"""The policies' part of a step: what each wants of the next one."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vllm_d2cache.canvas.standing import Standing
from vllm_d2cache.canvas.states import CanvasStates
from vllm_d2cache.canvas.view import CanvasView
from vllm_d2cache.mechanisms.base import Mechanisms, Worker
from vllm_d2cache.ops.host import upload_lists
from vllm_d2cache.ops.step_rows import store_plan
from vllm_d2cache.policies.base import CachePolicy, StepOutcome, StepPlan
from vllm_d2cache.policies.registry import policy_class


class Planning:
    """The policies of all running requests.

    Args:
        canvas: of the requests; plans are kept in it.
        mechanisms: keep what else plans ask for.
    """

    def __init__(self, worker: Worker, canvas: CanvasStates, mechanisms: Mechanisms) -> None:
        self.worker = worker
        self.canvas = canvas
        self.mechanisms = mechanisms
        self._policies: dict[str, CachePolicy] = {}
        self._standing = Standing(self._of_batch)

    def policy(self, name: str) -> CachePolicy:
        """The policy of that name; made when the first request asks for it, as its state takes memory."""
        if name not in self._policies:
            self._policies[name] = policy_class(name, self.worker.traits.block_length)(self.worker)
        return self._policies[name]

    def start(self, slot: int) -> None:
        """The plan of the first step of the request in ``slot``."""
        options = self.canvas.requests[slot].options
        policy = self.policy(options.policy)
        policy.start(slot, options)
        self._standing.forget()
        view = self.canvas.view(torch.arange(slot, slot + 1, device=self.canvas.device), [slot])
        self._store(policy.first_plan(view), view, [slot])

    def reads_entropy(self, slots: Sequence[int]) -> bool:
        """Whether some policy of these requests reads the entropy of what was predicted."""
        return any(policy.reads_entropy for policy, *_ in self._standing.of(slots))

    def next(self, view: CanvasView, outcome: StepOutcome, slots: Sequence[int]) -> None:
        """Ask each policy for the next plans of its requests.

        Args:
            view: after the step's commits.
            slots: of the requests, on the host.
        """
        for policy, rows, own in self._standing.of(slots):
            part, what = (view, outcome) if rows is None else (view.select(rows), outcome.select(rows))
            self._store(policy.next_plan(part, what), part, own)

    def _of_batch(self, slots: Sequence[int]) -> list[tuple[CachePolicy, torch.Tensor | None, list[int]]]:
        """Each policy of these requests, its lines of the batch, [m] int64, None = all of them, and their slots."""
        members: dict[str, list[int]] = {}
        for i, slot in enumerate(slots):
            members.setdefault(self.canvas.requests[slot].options.policy, []).append(i)
        if len(members) == 1:
            return [(self.policy(name), None, list(slots)) for name in members]
        lines = upload_lists(list(members.values()), torch.int64, self.canvas.device)
        return [
            (self.policy(name), rows, [slots[i] for i in mine])
            for (name, mine), rows in zip(members.items(), lines, strict=True)
        ]

    def _store(self, plan: StepPlan, view: CanvasView, slots: Sequence[int]) -> None:
        """Keep the plan of the requests in these slots, line by line."""
        told, observe = self.canvas.told, plan.observe
        says_more = observe is not None or plan.candidates is not None
        if observe is None and (says_more or not told.isdisjoint(slots)):
            observe = torch.zeros_like(view.masked)
        (told.update if says_more else told.difference_update)(slots)
        tables = self.canvas.plans(view.num_positions, view.masked.shape[1])
        store_plan(view.slots, plan.refresh, observe, plan.candidates, tables)
        self.mechanisms.store(view, plan.wishes)
