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
from vllm_d2cache.ops.host import upload_arrays
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
        self._tenants: dict[int, _Tenant] = {}
        self._members: list[int] = []  # slots of its requests in the step under way
        self._lead_token: torch.Tensor | None = None  # [m] int64, what each of them takes for its lead

    def start(self, slot: int, request: Request) -> None:
        """The grammar is at its start."""
        super().start(slot, request)
        assert request.grammar is not None
        self._tenants[slot] = _Tenant(request.grammar, request.options.longest_run(request.canvas_len))

    def stop(self, slot: int) -> None:
        """Forget the grammar."""
        self._tenants.pop(slot, None)

    def tile_reader(self, rows: PredictedRows) -> None:
        """Find what each request takes for its lead, if it has one to commit.

        Their logits are computed a second time: statistics and log-probabilities are those of the model alone.
        """
        view = rows.view
        self._members = list(rows.member_slots)
        self._lead_token = None
        if not len(rows.hidden):
            return
        words = np.stack([self._tenants[slot].grammar.allowed for slot in self._members])
        members = np.array(rows.members, dtype=np.int64)
        chosen, bitmask = upload_arrays([members, words], rows.hidden.device)
        lead = view.lead[chosen]
        # Where the lead is not predicted there is nothing to commit, and the row does not matter.
        place = (rows.predicted.flatten().cumsum(0) - 1).view(rows.predicted.shape)
        index = place[chosen, lead].clamp(min=0)
        params = rows.params.rows(index)
        edits = params.edits or RowEdits(LogitEdits(), chosen, lead)
        params = replace(params, edits=replace(edits, bitmask=bitmask))
        self._lead_token = row_stats(rows.hidden[index], rows.lm_head, params, rows.mask_token_id, False, False).token

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
        length, written_tokens = upload_arrays([lengths, padded], device)
        target = torch.where(torch.arange(most, device=device) < length, slot, width)
        written = torch.nn.functional.pad(step.token, (0, 1)).scatter(1, target, written_tokens)
        committed = torch.zeros(written.shape, dtype=torch.bool, device=device).scatter(1, target, True)
        return Commits(committed[:, :-1], written[:, :-1])
