"""Commits from left to right, as the grammars of requests allow it (canvas/grammar.py)."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch

from vllm_d2cache.canvas.grammar import GrammarState, RunPrediction
from vllm_d2cache.canvas.request import Request
from vllm_d2cache.decoders.base import Commits, Decoder, DecoderStep, PredictedRows
from vllm_d2cache.mechanisms.base import Worker
from vllm_d2cache.ops.host import Writes, upload_arrays
from vllm_d2cache.ops.logit_edits import LogitEdits, RowEdits
from vllm_d2cache.ops.row_stats import row_stats


class _Tenant(NamedTuple):
    grammar: GrammarState
    longest: int  # most tokens of a step


class GrammarDecoder(Decoder):
    """The leftmost mask takes the best token that the grammar allows, slots behind it what the grammar agrees with.

    It waits for the device: where a grammar is, is known on the host. Not chosen by name: it takes the place of the
    decoder of requests with a grammar.
    """

    name = "grammar"

    def __init__(self, worker: Worker) -> None:
        super().__init__(worker)
        self._num_slots = worker.num_slots
        self._tenants: dict[int, _Tenant] = {}
        self._members: list[int] = []  # slots of its requests in the step under way
        self._allowed: torch.Tensor | None = None  # [S, W] int32 by slot, what each grammar allows for the lead
        self._unsent: set[int] = set()  # slots whose line does not say so yet
        self._lead_token: torch.Tensor | None = None  # [m] int64, what each of them takes for its lead

    def start(self, slot: int, request: Request) -> None:
        """The grammar is at its start."""
        super().start(slot, request)
        assert request.grammar is not None
        self._tenants[slot] = _Tenant(request.grammar, request.options.longest_run(request.canvas_len))
        self._unsent.add(slot)

    def stop(self, slot: int) -> None:
        """Forget the grammar."""
        self._tenants.pop(slot, None)
        self._unsent.discard(slot)

    def tile_reader(self, rows: PredictedRows) -> None:
        """Find what each request takes for its lead, if it has one to commit.

        Their logits are computed a second time: statistics and log-probabilities are those of the model alone.
        """
        view = rows.view
        self._members = list(rows.member_slots)
        self._lead_token = None
        if not len(rows.hidden):
            return
        device = rows.hidden.device
        chosen = torch.arange(len(view.slots), device=device) if rows.lines is None else rows.lines
        bitmask = self._table(device)[view.slots[chosen]]
        lead = view.lead[chosen]
        # Where the lead is not predicted there is nothing to commit, and the row does not matter.
        place = (rows.predicted.flatten().cumsum(0) - 1).view(rows.predicted.shape)
        index = place[chosen, lead].clamp(min=0)
        params = rows.params.rows(index)
        edits = params.edits or RowEdits(LogitEdits(), chosen, lead)
        params = replace(params, edits=replace(edits, bitmask=bitmask))
        self._lead_token = row_stats(rows.hidden[index], rows.lm_head, params, rows.mask_token_id, False, False).token

    def _table(self, device: torch.device) -> torch.Tensor:
        """What the grammars of the step allow. Those that have gone on have sent it in the step before."""
        first = self._tenants[self._members[0]].grammar.allowed
        if self._allowed is None:
            self._allowed = torch.zeros(self._num_slots, len(first), dtype=torch.int32, device=device)
        writes = Writes(device)
        for slot in self._unsent.intersection(self._members):
            writes.put(self._allowed[slot], self._tenants[slot].grammar.allowed)
        writes.send()
        self._unsent.difference_update(self._members)
        return self._allowed

    def choose(self, step: DecoderStep) -> Commits:
        """What each grammar makes of the run of slots from its request's lead on."""
        view, (_, width), device = step.view, step.candidates.shape, step.candidates.device
        tenants = [self._tenants[slot] for slot in self._members]
        most = max(tenant.longest for tenant in tenants)
        slot = view.lead.unsqueeze(1) + torch.arange(most, device=device)
        inside = slot < width
        slot = slot.clamp(max=width - 1)
        threshold = view.options.threshold.unsqueeze(1)
        sure = (threshold > 0) & (step.score >= threshold)
        own, candidate, certain = (x.gather(1, slot) for x in (step.token.long(), step.candidates, sure))
        lead_token = own[:, 0] if self._lead_token is None else self._lead_token
        each = torch.stack([lead_token, step.least], 1)
        # One wait for all that the grammars look at.
        known = torch.cat([each, own, (candidate & inside).long(), certain.long()], 1).tolist()
        runs = []
        for tenant, (lead, least, *line) in zip(tenants, known, strict=True):
            run = RunPrediction(lead, line[:most], line[most : 2 * most], line[2 * most :], least)
            runs.append(tenant.grammar.follow(run, tenant.longest))
        # Slots without a token land in a column that is cut off.
        lengths = np.array([[len(run)] for run in runs], dtype=np.int64)
        padded = np.array([[*run, *[0] * (most - len(run))] for run in runs], dtype=np.int32)
        words = np.stack([tenant.grammar.allowed for tenant in tenants])
        length, written_tokens, allowed = upload_arrays([lengths, padded, words], device)
        if self._allowed is not None:
            self._allowed.index_copy_(0, view.slots, allowed)
        target = torch.where(torch.arange(most, device=device) < length, slot, width)
        written = torch.nn.functional.pad(step.token, (0, 1)).scatter(1, target, written_tokens)
        committed = torch.zeros(written.shape, dtype=torch.bool, device=device).scatter(1, target, True)
        return Commits(committed[:, :-1], written[:, :-1])
