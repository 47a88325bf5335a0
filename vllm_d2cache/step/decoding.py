"""The decoders' part of a step: what they need of the network, and what they make of it.

Requests with different decoders share a step. What one of them needs is computed only where a request of the step has
chosen it. Nothing here imports vLLM.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch

from vllm_d2cache.canvas.grammar import RunPrediction
from vllm_d2cache.canvas.states import CanvasStates, Request
from vllm_d2cache.canvas.view import CanvasView, StepRows
from vllm_d2cache.decoders import (
    DECODER_CLASSES,
    Decoder,
    DecoderResources,
    DecoderStep,
    PredictedRows,
    ranking_score,
)
from vllm_d2cache.decoders.schedule import least_commits
from vllm_d2cache.ops.density import certainty_density
from vllm_d2cache.ops.host import upload
from vllm_d2cache.ops.logit_edits import LogitEdits, RowEdits
from vllm_d2cache.ops.random import uniform
from vllm_d2cache.ops.row_stats import RowParams, RowStats, row_stats, token_probability
from vllm_d2cache.options.server import SCORES
from vllm_d2cache.step.constraints import Constraints


class Decoding:
    """The decoders of all running requests.

    Args:
        canvas: of the requests; read only.
        constraints: what the requests ask to be done to their logits; read only.
    """

    def __init__(self, canvas: CanvasStates, constraints: Constraints, resources: DecoderResources) -> None:
        self.canvas = canvas
        self.constraints = constraints
        self._resources = resources
        self._decoders: dict[str, Decoder] = {}

    def decoder(self, name: str) -> Decoder:
        """The decoder of that name; made when the first request asks for it."""
        if name not in self._decoders:
            self._decoders[name] = DECODER_CLASSES[name](self._resources)
        return self._decoders[name]

    def observes_all(self, requests: list[Request]) -> torch.Tensor:
        """[R] bool: the request's decoder reads the statistics of all masked slots that are computed."""
        flags = [DECODER_CLASSES[r.options.decoder].observes_all for r in requests]
        return upload(flags, torch.bool, self.canvas.device)

    def verifies(self, requests: list[Request]) -> torch.Tensor:
        """[R] bool: the request's decoder may take back what it committed in the current window."""
        flags = [DECODER_CLASSES[r.options.decoder].verifies for r in requests]
        return torch.tensor(flags, device=self.canvas.device)

    def shadow_rows(
        self, view: CanvasView, requests: list[Request], row_of: torch.Tensor
    ) -> tuple[tuple[torch.Tensor, torch.Tensor], list[int], torch.Tensor, torch.Tensor]:
        """Shadows of the current window where a decoder verifies and there is something to verify.

        Returns:
            Request and slot [v] of the committed slots to verify; shadows of each request; their positions [S]; the
            row [v] that each slot is read from.
        """
        device = self.canvas.device
        if not any(DECODER_CLASSES[r.options.decoder].verifies for r in requests):
            none = torch.empty(0, dtype=torch.int64, device=device)
            return (none, none), [0] * len(requests), none, none
        verified = view.in_window & ~view.masked & self.verifies(requests).unsqueeze(1)
        shadowed = view.in_window & verified.any(1, keepdim=True)
        owner, place = shadowed.nonzero(as_tuple=True)
        who, slot = verified.nonzero(as_tuple=True)
        # A slot is read where its family reads it: from the shadow, of a shifted family from that on the left; the
        # window's first slot then has none, and is read from the text.
        source = slot - self.canvas.traits.logit_shift
        shadow_of = shadowed.view(-1).cumsum(0).view_as(shadowed) - 1
        in_shadow = source >= view.window_start[who]
        text_row = row_of[who, view.prompt_len[who] + source]
        shadow_row = row_of.view(-1)[-1] + 1 + shadow_of[who, source.clamp(min=0)]
        rows = torch.where(in_shadow, shadow_row, text_row)
        return (who, slot), shadowed.sum(1).tolist(), view.prompt_len[owner] + place, rows

    def row_stats(
        self,
        rows: StepRows,
        hidden: torch.Tensor,
        lm_head: Callable[[torch.Tensor], torch.Tensor],
        want_entropy: bool,
    ) -> RowStats:
        """Statistics of the predicted slots: those that some request of the step reads.

        Args:
            hidden: [n + v, d] final hidden states, in the order of ``rows.logits_rows``.
            lm_head: maps [m, d] to [m, vocab] logits.
            want_entropy: somebody else reads the entropy, whatever scores and decoders do.
        """
        who, slot = rows.predicted_index
        params = self._row_params(rows, who, slot)
        verified = self._verify(rows, hidden[len(who) :], lm_head)
        hidden = hidden[: len(who)]
        requests = self._requests(rows)
        decoders = self._by_decoder(rows)
        scores = {r.options.score for r in requests}
        margin = SCORES[1] in scores
        entropy = want_entropy or SCORES[2] in scores or any(decoder.reads_entropy for decoder, _ in decoders)
        mask = self.canvas.traits.mask_token_id
        in_window = rows.view.in_window[who, slot.clamp(max=rows.predicted.shape[1] - 1)]
        readers = []
        for decoder, members in decoders:
            mine = torch.ones_like(who, dtype=torch.bool) if members is None else torch.isin(who, members)
            part = PredictedRows(rows.view.slots[who], slot, in_window, mine, hidden, lm_head, params, mask)
            reader = decoder.tile_reader(part)
            if reader is not None:
                readers.append(reader)
        stats = row_stats(hidden, lm_head, params, mask, margin, entropy, readers)
        return replace(stats, verified=verified, lead_token=self._lead_tokens(rows, hidden, lm_head, params))

    def _lead_tokens(
        self, rows: StepRows, hidden: torch.Tensor, lm_head: Callable[[torch.Tensor], torch.Tensor], params: RowParams
    ) -> torch.Tensor | None:
        """[m] int64: what each request with a grammar takes for its lead (grammar.py), if it has one to commit.

        Their logits are computed a second time: statistics and log-probabilities are those of the model alone.
        """
        requests = self._requests(rows)
        members = [i for i, r in enumerate(requests) if r.grammar is not None]
        if not members or not len(hidden):
            return None
        chosen = upload(members, torch.int64, self.canvas.device)
        lead = rows.view.lead[chosen]
        # Where the lead is not predicted there is nothing to commit, and the row does not matter.
        place = (rows.predicted.view(-1).cumsum(0) - 1).view_as(rows.predicted)
        index = place[chosen, lead].clamp(min=0)
        words = np.stack([g.allowed for r in requests if (g := r.grammar) is not None])
        bitmask = torch.from_numpy(words).to(self.canvas.device, non_blocking=True)
        edits = params.rows(index).edits or RowEdits(LogitEdits(), chosen, lead)
        part = replace(params.rows(index), edits=replace(edits, bitmask=bitmask))
        return row_stats(hidden[index], lm_head, part, self.canvas.traits.mask_token_id, False, False).token

    def _verify(
        self, rows: StepRows, hidden: torch.Tensor, lm_head: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor | None:
        """[v] float32: probability of the token of each verified slot; None where nobody verifies."""
        who, slot = rows.verified_index
        if not len(who):
            return None
        token = self.canvas.tokens[rows.view.slots[who], rows.view.prompt_len[who] + slot].long()
        return token_probability(
            hidden, lm_head, self._row_params(rows, who, slot), self.canvas.traits.mask_token_id, token
        )

    def _row_params(self, rows: StepRows, who: torch.Tensor, slot: torch.Tensor) -> RowParams:
        """Sampling parameters of the rows of canvas slots ``slot`` of requests ``who``."""
        slots = rows.view.slots[who]
        temperature, top_p, top_k = self.canvas.sampling[slots].unbind(1)
        position = rows.view.prompt_len[who] + slot
        draw = uniform(self.canvas.seed[slots], self.canvas.step[slots], position)
        requests = self._requests(rows)
        samples = any(r.sampling.temperature > 0 for r in requests)
        filters = any(
            r.options.confidence_top_p < 1
            or (r.sampling.temperature > 0 and (r.sampling.top_p < 1 or r.sampling.top_k > 0))
            for r in requests
        )
        edits = self.constraints.of_slots(rows, who, slot)
        return RowParams(temperature, top_p, top_k.long(), draw, samples, filters, edits)

    def choose(self, rows: StepRows, stats: RowStats) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Scores [R, G] of the predicted slots without the prior; the slots [R, G] that are committed, and taken back.

        The last is None where no decoder verifies anything.
        """
        view, decoders = rows.view, self._by_decoder(rows)
        who, _ = rows.predicted_index
        flat = ranking_score(stats, view.options.score[who])
        for decoder, members in decoders:
            changed = decoder.rescore(stats, flat, view.slots[who])
            flat = changed if members is None else torch.where(torch.isin(who, members), changed, flat)
        score = rows.by_slot(flat)
        entropy = None if stats.entropy is None else rows.by_slot(stats.entropy)
        step = DecoderStep(
            view,
            rows.candidates,
            self._with_prior(score, rows),
            least_commits(view, self.canvas.window_step[view.slots], self.canvas.traits.step_schedule),
            entropy,
        )
        revoked = None
        if stats.verified is not None:
            revoked, verified = torch.zeros_like(view.masked), torch.zeros_like(view.masked)
            verified[rows.verified_index] = True
            probability = torch.zeros_like(score)
            probability[rows.verified_index] = stats.verified
            step = replace(step, verified=verified, shadow_probability=probability)
        committed = torch.zeros_like(view.masked)
        for decoder, members in decoders:
            chosen = slice(None) if members is None else members
            part = step if members is None else step.select(members)
            committed[chosen] = decoder.choose(part)
            if revoked is not None and decoder.verifies:
                revoked[chosen] = decoder.revoke(part, committed[chosen])
        return score, committed, revoked

    def follow_grammars(
        self, rows: StepRows, stats: RowStats, score: torch.Tensor, token: torch.Tensor, committed: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``token`` [R, G] int32 and ``committed`` [R, G] bool with those of requests that have a grammar in place.

        It waits for the device: where a grammar is, is known on the host.

        Args:
            score: [R, G] float32, as from :meth:`choose`.
        """
        requests = self._requests(rows)
        members = [i for i, r in enumerate(requests) if r.grammar is not None]
        if not members:
            return token, committed
        device, view = self.canvas.device, rows.view
        longest = [requests[i].options.longest_run(requests[i].canvas_len) for i in members]
        chosen = upload(members, torch.int64, device)
        slot = view.lead[chosen].unsqueeze(1) + torch.arange(max(longest), device=device)
        inside = slot < committed.shape[1]
        slot = slot.clamp(max=committed.shape[1] - 1)
        threshold = view.options.threshold.unsqueeze(1)
        sure = (threshold > 0) & (self._with_prior(score, rows) >= threshold)
        least = least_commits(view, self.canvas.window_step[view.slots], self.canvas.traits.step_schedule)
        parts = (token.long(), rows.candidates, sure)
        own, candidate, certain = (part[chosen].gather(1, slot) for part in parts)
        lead_token = own[:, 0] if stats.lead_token is None else stats.lead_token
        known = torch.stack([own, (candidate & inside).long(), certain.long()]).tolist()
        head = torch.stack([lead_token, least[chosen]]).tolist()
        runs = []
        for i, request in enumerate(requests[m] for m in members):
            assert request.grammar is not None
            run = RunPrediction(head[0][i], *(part[i] for part in known), head[1][i])
            runs.append(request.grammar.follow(run, longest[i]))
        # Slots without a token land in a column that is cut off.
        length = upload([len(run) for run in runs], torch.int64, device).unsqueeze(1)
        padded = [t for run in runs for t in (*run, *[0] * (max(longest) - len(run)))]
        tokens = upload(padded, torch.int32, device).view_as(slot)
        target = torch.where(torch.arange(max(longest), device=device) < length, slot, committed.shape[1])
        wide = torch.nn.functional.pad(token[chosen], (0, 1)).scatter(1, target, tokens)
        token = token.index_copy(0, chosen, wide[:, :-1])
        wide = committed.new_zeros(wide.shape).scatter(1, target, True)
        return token, committed.index_copy(0, chosen, wide[:, :-1])

    def _with_prior(self, score: torch.Tensor, rows: StepRows) -> torch.Tensor:
        """Score times certainty density where a request asks for the prior (section 2, step 6)."""
        if not any(r.options.sigma > 0 for r in self._requests(rows)):
            return score
        view = rows.view
        known = ~view.masked & view.in_canvas
        return score * certainty_density(known, view.canvas_len, view.options.sigma)

    def _requests(self, rows: StepRows) -> list[Request]:
        return [self.canvas.requests[s] for s in rows.slots]

    def _by_decoder(self, rows: StepRows) -> list[tuple[Decoder, torch.Tensor | None]]:
        """Each decoder of the step and its rows [m] int64 of the batch; None where one decoder has them all."""
        names = [r.options.decoder for r in self._requests(rows)]
        if len(set(names)) == 1:
            return [(self.decoder(names[0]), None)]
        members = {name: [i for i, n in enumerate(names) if n == name] for name in dict.fromkeys(names)}
        return [(self.decoder(name), upload(m, torch.int64, self.canvas.device)) for name, m in members.items()]
