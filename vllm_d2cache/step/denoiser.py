"""One denoising step for a ragged batch, without an engine: which rows to compute, and what their outcome means.

``begin`` turns the plans of the last step into rows for the network; ``finish`` turns row statistics into commits,
the next plans, and the tokens to emit. In between the caller runs the network on the rows. Nothing here imports vLLM.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import accumulate, product

import numpy as np
import torch

from vllm_d2cache.canvas.states import CanvasStates, Request, canvas_to_positions, make_view, positions_to_canvas
from vllm_d2cache.canvas.view import CanvasView, FamilyTraits, StepOutcome, StepPlan, StepResult, StepRows
from vllm_d2cache.decoders import DECODER_CLASSES, DecoderResources
from vllm_d2cache.decoders.frequencies import load_frequencies
from vllm_d2cache.mechanisms.base import Finding, Hook, Mechanism, Use, Worker
from vllm_d2cache.observe.counters import StepCounters
from vllm_d2cache.ops.host import upload
from vllm_d2cache.ops.packing import pack_columns
from vllm_d2cache.ops.rollout import TensorParallel
from vllm_d2cache.ops.row_stats import RowStats
from vllm_d2cache.options.server import ServerOptions
from vllm_d2cache.policies import POLICY_CLASSES, CachePolicy
from vllm_d2cache.step.constraints import Constraints
from vllm_d2cache.step.decoding import Decoding


class Denoiser:
    """Canvases, policies and the decoding rules of all running requests.

    Args:
        num_slots: requests that can run at a time.
        max_len: most positions a request can have.
        traits: of the model family.
        options: server-wide options.
    """

    def __init__(
        self,
        num_slots: int,
        max_len: int,
        device: torch.device,
        traits: FamilyTraits,
        options: ServerOptions,
        tensor_parallel: TensorParallel | None = None,
    ) -> None:
        self.traits = traits
        self.counters = StepCounters()
        self.canvas = CanvasStates(num_slots, max_len, device, traits)
        self.constraints = Constraints(self.canvas)
        self.worker = Worker(num_slots, max_len, device, traits, options.refresh_budget, tensor_parallel)
        self._policies: dict[str, CachePolicy] = {}
        self._mechanisms: dict[type[Use], Mechanism] = {}
        table = None if options.token_frequencies is None else load_frequencies(options.token_frequencies)
        frequencies = None if table is None else torch.from_numpy(table)
        resources = DecoderResources(num_slots, max_len, device, frequencies)
        self.decoding = Decoding(self.canvas, self.constraints, resources)
        self._begun: set[int] = set()  # slots whose first step is under way or over

    def add(self, slot: int, request: Request, prompt: np.ndarray, emitted: int = 0) -> None:
        """Start a request in ``slot``; see CanvasStates.add."""
        self._begun.discard(slot)
        self._forget(slot)
        self.canvas.add(slot, request, prompt, emitted)
        self.constraints.add(slot, request)
        index = torch.tensor([slot], device=self.canvas.device)
        view = self.canvas.view(index, [slot])
        policy = self._policy(request.options.policy)
        policy.start(slot, request.options)
        self._store(policy.first_plan(view), view)
        self.decoding.decoder(request.options.decoder).start(slot, request.options, request.canvas_len)

    def remove(self, slot: int) -> None:
        """Forget the request in ``slot``."""
        self.decoding.decoder(self.canvas.requests[slot].options.decoder).stop(slot)
        self.constraints.remove(slot)
        self._forget(slot)
        self.canvas.remove(slot)

    def can_pad(self, slots_host: Sequence[int]) -> bool:
        """Whether a step of these requests can be padded: no first step, and nothing whose shapes the device decides.

        Mechanisms need exact rows; so do edits, grammars and most decoders.
        """
        requests = [self.canvas.requests[s] for s in slots_host]
        return (
            self._begun.issuperset(slots_host)
            and not any(POLICY_CLASSES[r.options.policy].uses for r in requests)
            and all(DECODER_CLASSES[r.options.decoder].takes_padding for r in requests)
            and not self.constraints.any_of(slots_host)
            and not any(r.options.ordered for r in requests)
        )

    def begin(self, slots: torch.Tensor, slots_host: Sequence[int], padded: bool = False) -> StepRows:
        """The rows of this step.

        Args:
            slots: [R] int64 on the device; ``slots_host`` the same on the host.
            padded: give each request as many rows as it can need at most, and do not wait for the device to learn how
                many it does need; only where :meth:`can_pad`. What the step decides is the same.
        """
        canvas, device = self.canvas, self.canvas.device
        requests = [canvas.requests[s] for s in slots_host]
        view = canvas.view(slots, list(slots_host))
        refresh = canvas.refresh[slots, : view.num_positions] & view.in_text
        eligible = view.in_window & canvas.eligible[slots, : view.masked.shape[1]]
        if any(r.options.ordered for r in requests):
            refresh, eligible = self._with_lead(view, refresh, eligible)
        observe = canvas.observe[slots, : view.masked.shape[1]]
        computed = positions_to_canvas(refresh, view, self.traits.logit_shift)
        observe = observe | self.decoding.observes_all(requests).unsqueeze(1)
        predictable = computed & view.masked & view.live
        predicted = predictable & (eligible | observe)
        refreshed = refresh.sum(1)

        lengths = [r.prompt_len + r.canvas_len for r in requests]
        bounds = [
            r.row_budget if s in self._begun else t for s, r, t in zip(slots_host, requests, lengths, strict=True)
        ]
        self._begun.update(slots_host)
        if padded:
            # A predicted slot has a row of its own.
            counts = bounds
            predictions = [min(n, r.canvas_len) for n, r in zip(bounds, requests, strict=True)]
        else:
            # The one place of a step that waits for the device: how many rows, and how many of them lead to logits.
            # (Policies that need exact rows, logit edits and some decoders wait once more.)
            counts, predictions = torch.stack([refreshed, predicted.sum(1)]).tolist()
        starts, places, prediction_starts, prediction_places = upload(
            [*_starts(counts), *counts, *_starts(predictions), *predictions], torch.int64, device
        ).view(4, -1)
        request, positions, row_of = pack_columns(refresh, starts, places, sum(counts))
        who, slot, _ = pack_columns(predicted, prediction_starts, prediction_places, sum(predictions))
        live, positions = positions >= 0, positions.clamp(min=0)
        logits_rows = row_of[who, (view.prompt_len[who] + slot - self.traits.logit_shift).clamp(min=0)]
        verified, shadows, shadow_positions, verified_rows = self.decoding.shadow_rows(view, requests, row_of)
        tokens = canvas.tokens[slots[request], positions]
        masks = tokens.new_full(shadow_positions.shape, self.traits.mask_token_id)
        rows = StepRows(
            view=view,
            slots=list(slots_host),
            counts=counts,
            bounds=bounds,
            refreshed=refreshed,
            full=[n == t and not padded for n, t in zip(counts, lengths, strict=True)],
            reads_importance=[POLICY_CLASSES[r.options.policy].reads_importance for r in requests],
            positions=torch.cat([positions, shadow_positions]),
            input_ids=torch.cat([tokens, masks]),
            request=request,
            live=live,
            candidates=predictable & eligible,
            predicted=predicted,
            predicted_index=(who, torch.where(slot >= 0, slot, predicted.shape[1])),
            logits_rows=torch.cat([logits_rows.clamp(min=0), verified_rows]),
            verified_index=verified,
            shadows=shadows,
            prompt_lens=[r.prompt_len for r in requests],
        )
        return replace(rows, hooks=self._open(rows, requests, lengths))

    def _with_lead(
        self, view: CanvasView, refresh: torch.Tensor, eligible: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``refresh`` [R, T] and ``eligible`` [R, G] of requests whose tokens are committed from left to right.

        Their leftmost mask can always be committed, whatever the policy would recompute; slots that are further away
        than a step goes cannot.
        """
        run, lead = view.options.longest_run.unsqueeze(1), view.lead.unsqueeze(1)
        at_lead = (view.slot_index == lead) & (run > 0)
        eligible = (eligible & ((view.slot_index < lead + run) | (run == 0))) | at_lead
        return refresh | canvas_to_positions(at_lead, view, self.traits.logit_shift), eligible

    def _open(self, rows: StepRows, requests: list[Request], lengths: list[int]) -> tuple[Hook, ...]:
        """A hook of each mechanism that some request's policy uses."""
        members: dict[type[Use], dict[int, Use]] = {}
        for r, request in enumerate(requests):
            for use in POLICY_CLASSES[request.options.policy].uses:
                members.setdefault(type(use), {})[r] = use
        return tuple(self._mechanisms[kind].open(rows, mine, lengths) for kind, mine in members.items())

    def _forget(self, slot: int) -> None:
        for mechanism in self._mechanisms.values():
            mechanism.forget(slot)

    def row_stats(
        self, rows: StepRows, hidden: torch.Tensor, lm_head: Callable[[torch.Tensor], torch.Tensor]
    ) -> RowStats:
        """Statistics of the predicted slots: those that some request of the step reads.

        Args:
            hidden: [n + v, d] final hidden states, in the order of ``rows.logits_rows``.
            lm_head: maps [m, d] to [m, vocab] logits.
        """
        return self.decoding.row_stats(rows, hidden, lm_head, self._reads_entropy(self._requests(rows)))

    def finish(
        self, rows: StepRows, stats: RowStats, importance: torch.Tensor | None, found: tuple[Finding, ...] = ()
    ) -> StepResult:
        """Commit, plan the next step, and say what is new.

        Args:
            stats: of the predicted slots, in the order of ``rows.logits_rows``.
            importance: [R, T] float32; rows of requests whose policy reads none are not looked at.
            found: by the hooks of the step.
        """
        view, canvas = rows.view, self.canvas
        token = rows.by_slot(stats.token.int())
        score, committed, revoked = self.decoding.choose(rows, stats)
        token, committed = self.decoding.follow_grammars(rows, stats, score, token, committed)
        after = self._commit(view, committed, token, revoked)
        entropy = None
        if self._reads_entropy(self._requests(rows)):
            assert stats.entropy is not None
            entropy = rows.by_slot(stats.entropy)
        outcome = StepOutcome(
            committed,
            rows.predicted,
            score,
            view.window_start,
            canvas.step[view.slots] == 0,
            importance,
            entropy,
            found,
        )
        self.counters.add(rows, self._keys_attended(rows), committed)
        canvas.step[view.slots] += 1
        stays = after.window_start == view.window_start
        canvas.window_step[view.slots] = torch.where(stays, canvas.window_step[view.slots] + 1, 0)
        self._plan(after, outcome, [r.options.policy for r in self._requests(rows)])
        return self._emit(after, committed, revoked, self._requests(rows))

    def _requests(self, rows: StepRows) -> list[Request]:
        return [self.canvas.requests[s] for s in rows.slots]

    @staticmethod
    def _reads_entropy(requests: list[Request]) -> bool:
        return any(POLICY_CLASSES[r.options.policy].reads_entropy for r in requests)

    def _keys_attended(self, rows: StepRows) -> list[int]:
        """How many keys the rows of each request attended to."""
        counts = [r.prompt_len + r.canvas_len for r in self._requests(rows)]
        for r, hook in product(range(len(counts)), rows.hooks):
            seen = hook.keys_attended(r)
            counts[r] = counts[r] if seen is None else seen
        return counts

    def _commit(
        self, view: CanvasView, committed: torch.Tensor, token: torch.Tensor, revoked: torch.Tensor | None
    ) -> CanvasView:
        """Write the committed tokens, mask the revoked ones; returns the canvases after it."""
        canvas, width = self.canvas, committed.shape[1]
        text = canvas.tokens[view.slots, : view.num_positions]
        text = torch.where(canvas_to_positions(committed, view), canvas_to_positions(token, view), text)
        stops = (token.unsqueeze(2) == canvas.stop_ids[view.slots].unsqueeze(1)).any(2)
        masked = canvas.masked[view.slots, :width] & ~committed
        terminal = canvas.terminal[view.slots, :width] | (stops & committed)
        if revoked is not None:
            text = torch.where(canvas_to_positions(revoked, view), self.traits.mask_token_id, text)
            masked |= revoked
            terminal &= ~revoked
        canvas.tokens[view.slots, : view.num_positions] = text
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
        """The policy of that name; made with its mechanisms when a request first asks for it: both take memory."""
        if name not in self._policies:
            self._policies[name] = POLICY_CLASSES[name](self.worker)
            for use in self._policies[name].uses:
                if type(use) not in self._mechanisms:
                    self._mechanisms[type(use)] = use.make(self.worker)
        return self._policies[name]

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
        for wish in plan.wishes:
            self._mechanisms[wish.use].store(view, wish)

    def _emit(
        self, view: CanvasView, committed: torch.Tensor, revoked: torch.Tensor | None, requests: list[Request]
    ) -> StepResult:
        """Hand out the newly contiguous tokens from the left, but none that may be taken back."""
        canvas = self.canvas
        done = (~view.masked & view.in_canvas).to(torch.int8).cumprod(1).sum(1)
        if any(DECODER_CLASSES[r.options.decoder].verifies for r in requests):
            # Verified are slots of the current window; those of windows before it are final.
            open_window = (view.masked & view.live).any(1) & self.decoding.verifies(requests)
            done = torch.where(open_window, torch.minimum(done, view.window_start), done)
        emitted = canvas.emitted[view.slots]
        fresh = (done - emitted).clamp(min=0)
        index = view.prompt_len.unsqueeze(1) + emitted.unsqueeze(1) + view.slot_index
        tokens = canvas.tokens[view.slots, : view.num_positions].gather(1, index.clamp(max=view.num_positions - 1))
        canvas.emitted[view.slots] = emitted + fresh
        return StepResult(tokens.long(), fresh.int(), committed, view.masked, revoked)


def _starts(counts: list[int]) -> list[int]:
    """Where each of stretches of these lengths begins."""
    return list(accumulate(counts[:-1], initial=0))
