"""One denoising step for a ragged batch, without an engine: which rows to compute, and what their outcome means.

``begin`` turns the plans of the last step into rows for the network; ``finish`` turns row statistics into commits,
the next plans, and the tokens to emit. In between the caller runs the network on the rows. Nothing here imports vLLM.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from vllm_d2cache.canvas import CanvasStates, Request, canvas_to_positions, make_view, positions_to_canvas
from vllm_d2cache.config import SCORES, ServerOptions
from vllm_d2cache.constraints import Constraints
from vllm_d2cache.counters import StepCounters
from vllm_d2cache.ops.density import certainty_density
from vllm_d2cache.ops.host import upload
from vllm_d2cache.ops.random import uniform
from vllm_d2cache.ops.row_stats import RowParams, RowStats, row_stats
from vllm_d2cache.policies import POLICY_CLASSES, CachePolicy
from vllm_d2cache.records import (
    CanvasView,
    Drift,
    FamilyTraits,
    KeyChoice,
    StepOutcome,
    StepPlan,
    StepResult,
    StepRows,
    StoredRows,
    WatchedRows,
)
from vllm_d2cache.samplers import (
    DECODER_CLASSES,
    Decoder,
    DecoderResources,
    DecoderStep,
    PredictedRows,
    ranking_score,
)
from vllm_d2cache.samplers.frequencies import load_frequencies
from vllm_d2cache.samplers.schedule import least_commits


class Denoiser:
    """Canvases, policies and the decoding rules of all running requests.

    Args:
        num_slots: requests that can run at a time.
        max_len: most positions a request can have.
        traits: of the model family.
        options: server-wide options.
    """

    def __init__(
        self, num_slots: int, max_len: int, device: torch.device, traits: FamilyTraits, options: ServerOptions
    ) -> None:
        self.traits = traits
        self.counters = StepCounters()
        self.canvas = CanvasStates(num_slots, max_len, device, traits)
        self.constraints = Constraints(self.canvas)
        self._policy_args = (num_slots, max_len, device, traits.logit_shift, options.refresh_budget)
        self._policies: dict[str, CachePolicy] = {}
        table = None if options.token_frequencies is None else load_frequencies(options.token_frequencies)
        frequencies = None if table is None else torch.from_numpy(table)
        self._decoder_resources = DecoderResources(num_slots, max_len, device, frequencies)
        self._decoders: dict[str, Decoder] = {}

    def add(self, slot: int, request: Request, prompt: np.ndarray, emitted: int = 0) -> None:
        """Start a request in ``slot``; see CanvasStates.add."""
        self.canvas.add(slot, request, prompt, emitted)
        self.constraints.add(slot, request)
        index = torch.tensor([slot], device=self.canvas.device)
        view = self.canvas.view(index, [slot])
        policy = self._policy(request.options.policy)
        policy.start(slot, request.options)
        self._store(policy.first_plan(view), view)
        self._decoder(request.options.decoder).start(slot, request.options, request.canvas_len)

    def remove(self, slot: int) -> None:
        """Forget the request in ``slot``."""
        self._decoder(self.canvas.requests[slot].options.decoder).stop(slot)
        self.constraints.remove(slot)
        self.canvas.remove(slot)

    def begin(self, slots: torch.Tensor, slots_host: Sequence[int]) -> StepRows:
        """The rows of this step.

        Args:
            slots: [R] int64 on the device; ``slots_host`` the same on the host.
        """
        canvas = self.canvas
        requests = [canvas.requests[s] for s in slots_host]
        view = canvas.view(slots, list(slots_host))
        refresh = canvas.refresh[slots, : view.num_positions] & view.in_text
        observe = canvas.observe[slots, : view.masked.shape[1]]
        computed = positions_to_canvas(refresh, view, self.traits.logit_shift)
        observes_all = [DECODER_CLASSES[r.options.decoder].observes_all for r in requests]
        if any(observes_all):
            observe = observe | torch.tensor(observes_all, device=canvas.device).unsqueeze(1)
        eligible = view.in_window & canvas.eligible[slots, : view.masked.shape[1]]
        predictable = computed & view.masked & view.live
        predicted = predictable & (eligible | observe)

        # The one place of a step that waits for the device: how many rows, and how many of them lead to logits.
        # (Policies that hide keys, store outputs or read drift wait once more.)
        counts, predictions = torch.stack([refresh.sum(1), predicted.sum(1)]).tolist()
        keys, choices = self._visible_keys(view, requests, refresh)
        request, positions = refresh.nonzero_static(size=sum(counts)).unbind(1)
        row_of = refresh.view(-1).cumsum(0).view_as(refresh) - 1  # [R, T] row of each refreshed position
        who, slot = predicted.nonzero_static(size=sum(predictions)).unbind(1)
        return StepRows(
            view=view,
            slots=list(slots_host),
            counts=counts,
            full=[n == r.prompt_len + r.canvas_len for n, r in zip(counts, requests, strict=True)],
            reads_importance=[POLICY_CLASSES[r.options.policy].reads_importance for r in requests],
            keys=keys,
            choices=choices,
            stored=self._stored_rows(view, requests, request, positions),
            watched=self._watched_rows(view, requests, refresh, predictable & eligible),
            positions=positions,
            input_ids=canvas.tokens[slots[request], positions],
            request=request,
            candidates=predictable & eligible,
            predicted=predicted,
            predicted_index=(who, slot),
            logits_rows=row_of[who, view.prompt_len[who] + slot - self.traits.logit_shift],
        )

    def _visible_keys(
        self, view: CanvasView, requests: list[Request], refresh: torch.Tensor
    ) -> tuple[list[torch.Tensor | None], list[KeyChoice | None]]:
        """StepRows.keys and choices; costs nothing where no request's policy hides keys."""
        keys: list[torch.Tensor | None] = [None] * len(requests)
        choices: list[KeyChoice | None] = [None] * len(requests)
        hiding = [r for r, request in enumerate(requests) if POLICY_CLASSES[request.options.policy].hides_keys]
        if not hiding:
            return keys, choices
        chosen = torch.tensor(hiding, device=self.canvas.device)
        visible = self.canvas.visible[view.slots[chosen], : view.num_positions] & view.in_text[chosen]
        numbers = self.canvas.kept[view.slots[chosen]].tolist()
        window = canvas_to_positions(view.in_window, view)
        counts = visible.sum(1).tolist()
        for i, positions in enumerate(visible.nonzero()[:, 1].split(counts)):
            r, (choose, apply, count, pool) = hiding[i], numbers[i]
            if choose or apply:
                queries = window[r][refresh[r]].nonzero().flatten()
                choices[r] = KeyChoice(bool(choose), positions, queries, count, pool)
            elif counts[i] < requests[r].prompt_len + requests[r].canvas_len:
                keys[r] = positions
        return keys, choices

    def _stored_rows(
        self, view: CanvasView, requests: list[Request], request: torch.Tensor, positions: torch.Tensor
    ) -> StoredRows | None:
        """StepRows.stored; costs nothing where no request's policy stores outputs."""
        storing = [r for r, q in enumerate(requests) if POLICY_CLASSES[q.options.policy].stores_outputs]
        if not storing:
            return None
        stores = torch.zeros(len(requests), dtype=torch.bool, device=self.canvas.device)
        stores[storing] = True
        kind = self.canvas.stored[view.slots[request], positions] * stores[request]
        count = self.canvas.stored_count[view.slots]
        computed = torch.zeros_like(count).index_add_(0, request, (kind == 0).long())
        compared = torch.zeros_like(count).index_add_(0, request, (kind == 2).long())
        # From the position before the canvas on: a shifted family reads its first slot there.
        place = positions - view.prompt_len[request] + 1
        kept = {}
        for r in storing:
            mine = ((request == r) & (place >= 0)).nonzero().flatten()
            kept[r] = (mine, place[mine])
        return StoredRows(
            stored=kind > 0,
            compared=(kind == 2).nonzero().flatten(),
            request=request,
            count=count,
            computed=(computed + torch.minimum(compared, count)).tolist(),
            kept=kept,
            capacity={r: requests[r].canvas_len + 1 for r in storing},
        )

    def _watched_rows(
        self, view: CanvasView, requests: list[Request], refresh: torch.Tensor, candidates: torch.Tensor
    ) -> list[WatchedRows | None]:
        """StepRows.watched; costs nothing where no request's policy reads drift."""
        watched: list[WatchedRows | None] = [None] * len(requests)
        reading = [r for r, request in enumerate(requests) if POLICY_CLASSES[request.options.policy].reads_drift]
        if not reading:
            return watched
        looking = canvas_to_positions(candidates, view) & refresh
        known = ~canvas_to_positions(view.masked, view)
        for r in reading:
            length = requests[r].prompt_len + requests[r].canvas_len
            rows = looking[r][refresh[r]].nonzero().flatten()
            watched[r] = WatchedRows(rows, looking[r].nonzero().flatten(), known[r, :length])
        return watched

    def row_stats(
        self, rows: StepRows, hidden: torch.Tensor, lm_head: Callable[[torch.Tensor], torch.Tensor]
    ) -> RowStats:
        """Statistics of the predicted slots: those that some request of the step reads.

        Args:
            hidden: [n, d] final hidden states, in the order of ``rows.logits_rows``.
            lm_head: maps [m, d] to [m, vocab] logits.
        """
        params = self._row_params(rows)
        requests = self._requests(rows)
        decoders = self._by_decoder(rows)
        scores = {r.options.score for r in requests}
        margin = SCORES[1] in scores
        entropy = SCORES[2] in scores or any(decoder.reads_entropy for decoder, _ in decoders)
        entropy = entropy or self._reads_entropy(requests)
        who, slot = rows.predicted_index
        mask = self.traits.mask_token_id
        in_window = rows.view.in_window[who, slot]
        readers = []
        for decoder, members in decoders:
            mine = torch.ones_like(who, dtype=torch.bool) if members is None else torch.isin(who, members)
            part = PredictedRows(rows.view.slots[who], slot, in_window, mine, hidden, lm_head, params, mask)
            reader = decoder.tile_reader(part)
            if reader is not None:
                readers.append(reader)
        return row_stats(hidden, lm_head, params, mask, margin, entropy, readers)

    def _row_params(self, rows: StepRows) -> RowParams:
        """Sampling parameters of the predicted rows."""
        who, slot = rows.predicted_index
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
        edits = self.constraints.of_rows(rows)
        return RowParams(temperature, top_p, top_k.long(), draw, samples, filters, edits)

    def finish(
        self, rows: StepRows, stats: RowStats, importance: torch.Tensor | None, drift: Drift | None = None
    ) -> StepResult:
        """Commit, plan the next step, and say what is new.

        Args:
            stats: of the predicted slots, in the order of ``rows.logits_rows``.
            importance: [R, T] float32; rows of requests whose policy reads none are not looked at.
            drift: likewise.
        """
        view, canvas = rows.view, self.canvas
        who, slot = rows.predicted_index
        token = torch.zeros(view.masked.shape, dtype=torch.int32, device=canvas.device)
        token[who, slot] = stats.token.int()
        score, committed = self._choose(rows, stats)
        after = self._commit(view, committed, token)
        entropy = None
        if self._reads_entropy(self._requests(rows)):
            assert stats.entropy is not None
            entropy = torch.zeros(view.masked.shape, device=canvas.device)
            entropy[who, slot] = stats.entropy
        outcome = StepOutcome(
            committed,
            rows.predicted,
            score,
            view.window_start,
            canvas.step[view.slots] == 0,
            importance,
            entropy,
            drift,
        )
        lengths = [r.prompt_len + r.canvas_len for r in self._requests(rows)]
        self.counters.add(rows, lengths, committed)
        canvas.step[view.slots] += 1
        stays = after.window_start == view.window_start
        canvas.window_step[view.slots] = torch.where(stays, canvas.window_step[view.slots] + 1, 0)
        self._plan(after, outcome, [r.options.policy for r in self._requests(rows)])
        return self._emit(after, committed)

    def _requests(self, rows: StepRows) -> list[Request]:
        return [self.canvas.requests[s] for s in rows.slots]

    @staticmethod
    def _reads_entropy(requests: list[Request]) -> bool:
        return any(POLICY_CLASSES[r.options.policy].reads_entropy for r in requests)

    def _choose(self, rows: StepRows, stats: RowStats) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores [R, G] of the predicted slots without the prior, and the slots [R, G] that are committed."""
        view, decoders = rows.view, self._by_decoder(rows)
        who, slot = rows.predicted_index
        flat = ranking_score(stats, view.options.score[who])
        for decoder, members in decoders:
            changed = decoder.rescore(stats, flat, view.slots[who])
            flat = changed if members is None else torch.where(torch.isin(who, members), changed, flat)
        score = torch.zeros(view.masked.shape, device=self.canvas.device)
        score[who, slot] = flat
        entropy = None
        if stats.entropy is not None:
            entropy = torch.zeros_like(score)
            entropy[who, slot] = stats.entropy
        step = DecoderStep(
            view,
            rows.candidates,
            self._with_prior(score, rows),
            least_commits(view, self.canvas.window_step[view.slots], self.traits.step_schedule),
            entropy,
        )
        committed = torch.zeros_like(view.masked)
        for decoder, members in decoders:
            if members is None:
                committed = decoder.choose(step)
            else:
                committed[members] = decoder.choose(step.select(members))
        return score, committed

    def _with_prior(self, score: torch.Tensor, rows: StepRows) -> torch.Tensor:
        """Score times certainty density where a request asks for the prior (section 2, step 6)."""
        if not any(r.options.sigma > 0 for r in self._requests(rows)):
            return score
        view = rows.view
        known = ~view.masked & view.in_canvas
        return score * certainty_density(known, view.canvas_len, view.options.sigma)

    def _commit(self, view: CanvasView, committed: torch.Tensor, token: torch.Tensor) -> CanvasView:
        """Write the committed tokens; returns the canvases after it."""
        canvas, width = self.canvas, committed.shape[1]
        text = canvas.tokens[view.slots, : view.num_positions]
        chosen = torch.where(canvas_to_positions(committed, view), canvas_to_positions(token, view), text)
        canvas.tokens[view.slots, : view.num_positions] = chosen
        stops = (token.unsqueeze(2) == canvas.stop_ids[view.slots].unsqueeze(1)).any(2)
        masked = canvas.masked[view.slots, :width] & ~committed
        terminal = canvas.terminal[view.slots, :width] | (stops & committed)
        canvas.masked[view.slots, :width] = masked
        canvas.terminal[view.slots, :width] = terminal
        return make_view(
            view.slots,
            view.prompt_len,
            view.canvas_len,
            masked,
            terminal,
            view.num_positions,
            view.options,
        )

    def _policy(self, name: str) -> CachePolicy:
        """The policy of that name; made when the first request asks for it, as its state takes memory."""
        if name not in self._policies:
            self._policies[name] = POLICY_CLASSES[name](*self._policy_args)
        return self._policies[name]

    def _decoder(self, name: str) -> Decoder:
        """The decoder of that name; made when the first request asks for it."""
        if name not in self._decoders:
            self._decoders[name] = DECODER_CLASSES[name](self._decoder_resources)
        return self._decoders[name]

    def _by_decoder(self, rows: StepRows) -> list[tuple[Decoder, torch.Tensor | None]]:
        """Each decoder of the step and its rows [m] int64 of the batch; None where one decoder has them all."""
        names = [r.options.decoder for r in self._requests(rows)]
        if len(set(names)) == 1:
            return [(self._decoder(names[0]), None)]
        members = {name: [i for i, n in enumerate(names) if n == name] for name in dict.fromkeys(names)}
        return [(self._decoder(name), torch.tensor(m, device=self.canvas.device)) for name, m in members.items()]

    def _plan(self, view: CanvasView, outcome: StepOutcome, names: list[str]) -> None:
        """Ask each policy for the next plans of its requests; ``names`` has each row's policy."""
        for name in dict.fromkeys(names):
            if all(n == name for n in names):
                self._store(self._policy(name).next_plan(view, outcome), view)
                continue
            rows = upload([i for i, n in enumerate(names) if n == name], torch.int64, self.canvas.device)
            part = view.select(rows)
            self._store(self._policy(name).next_plan(part, outcome.select(rows)), part)

    def _store(self, plan: StepPlan, view: CanvasView) -> None:
        self.canvas.refresh[view.slots, : plan.refresh.shape[1]] = plan.refresh
        self.canvas.observe[view.slots, : plan.observe.shape[1]] = plan.observe
        eligible = True if plan.candidates is None else plan.candidates
        self.canvas.eligible[view.slots, : plan.observe.shape[1]] = eligible
        if plan.visible is not None:
            self.canvas.visible[view.slots, : plan.visible.shape[1]] = plan.visible
            self.canvas.kept[view.slots] = 0 if plan.kept is None else torch.stack([x.long() for x in plan.kept], 1)
        if plan.stored is not None:
            kind = plan.stored.rows.to(torch.int8) + plan.stored.compared.to(torch.int8)
            self.canvas.stored[view.slots, : kind.shape[1]] = kind
            self.canvas.stored_count[view.slots] = plan.stored.count

    def _emit(self, view: CanvasView, committed: torch.Tensor) -> StepResult:
        """Hand out the newly contiguous tokens from the left."""
        canvas = self.canvas
        done = (~view.masked & view.in_canvas).to(torch.int8).cumprod(1).sum(1)
        emitted = canvas.emitted[view.slots]
        fresh = (done - emitted).clamp(min=0)
        index = view.prompt_len.unsqueeze(1) + emitted.unsqueeze(1) + view.slot_index
        tokens = canvas.tokens[view.slots, : view.num_positions].gather(1, index.clamp(max=view.num_positions - 1))
        canvas.emitted[view.slots] = emitted + fresh
        return StepResult(tokens.long(), fresh.int(), committed, view.masked)
