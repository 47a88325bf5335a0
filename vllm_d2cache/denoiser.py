"""One denoising step for a ragged batch, without an engine: which rows to compute, and what their outcome means.

``begin`` turns the plans of the last step into rows for the network; ``finish`` turns row statistics into commits,
the next plans, and the tokens to emit. In between the caller runs the network on the rows. Nothing here imports vLLM.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from vllm_d2cache.canvas import CanvasStates, Request, canvas_to_positions, make_view, positions_to_canvas
from vllm_d2cache.config import SCORES, ServerOptions
from vllm_d2cache.ops.density import certainty_density
from vllm_d2cache.ops.host import upload
from vllm_d2cache.ops.random import uniform
from vllm_d2cache.ops.row_stats import RowParams, RowStats
from vllm_d2cache.policies import POLICY_CLASSES, CachePolicy
from vllm_d2cache.records import CanvasView, FamilyTraits, StepOutcome, StepPlan, StepResult, StepRows
from vllm_d2cache.samplers import choose_commits, ranking_score


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
        self.canvas = CanvasStates(num_slots, max_len, device, traits)
        self._policy_args = (num_slots, max_len, device, traits.logit_shift, options.refresh_budget)
        self._policies: dict[str, CachePolicy] = {}

    def add(self, slot: int, request: Request, prompt: np.ndarray, emitted: int = 0) -> None:
        """Start a request in ``slot``; see CanvasStates.add."""
        self.canvas.add(slot, request, prompt, emitted)
        index = torch.tensor([slot], device=self.canvas.device)
        view = self.canvas.view(index, [slot])
        self._store(self._policy(request.options.policy).first_plan(view), view)

    def remove(self, slot: int) -> None:
        """Forget the request in ``slot``."""
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
        predicted = computed & view.masked & view.live & (view.in_window | observe)

        # The one place of a step that waits for the device: how many rows, and how many of them lead to logits.
        counts, predictions = torch.stack([refresh.sum(1), predicted.sum(1)]).tolist()
        request, positions = refresh.nonzero_static(size=sum(counts)).unbind(1)
        row_of = refresh.view(-1).cumsum(0).view_as(refresh) - 1  # [R, T] row of each refreshed position
        who, slot = predicted.nonzero_static(size=sum(predictions)).unbind(1)
        return StepRows(
            view=view,
            slots=list(slots_host),
            counts=counts,
            full=[n == r.prompt_len + r.canvas_len for n, r in zip(counts, requests, strict=True)],
            reads_importance=[POLICY_CLASSES[r.options.policy].reads_importance for r in requests],
            positions=positions,
            input_ids=canvas.tokens[slots[request], positions],
            request=request,
            predicted=predicted,
            predicted_index=(who, slot),
            logits_rows=row_of[who, view.prompt_len[who] + slot - self.traits.logit_shift],
        )

    def row_params(self, rows: StepRows) -> tuple[RowParams, bool, bool]:
        """Sampling parameters of the predicted rows, and whether margins and entropies are wanted."""
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
        scores = {r.options.score for r in requests}
        params = RowParams(temperature, top_p, top_k.long(), draw, samples, filters)
        return params, SCORES[1] in scores, SCORES[2] in scores

    def finish(self, rows: StepRows, stats: RowStats, importance: torch.Tensor | None) -> StepResult:
        """Commit, plan the next step, and say what is new.

        Args:
            stats: of the predicted slots, in the order of ``rows.logits_rows``.
            importance: [R, T] float32; rows of requests whose policy reads none are not looked at.
        """
        view, canvas = rows.view, self.canvas
        who, slot = rows.predicted_index
        score = torch.zeros(view.masked.shape, device=canvas.device)
        score[who, slot] = ranking_score(stats, view.options.score[who])
        token = torch.zeros(view.masked.shape, dtype=torch.int32, device=canvas.device)
        token[who, slot] = stats.token.int()

        candidates = rows.predicted & view.in_window
        committed = choose_commits(self._with_prior(score, rows), candidates, view.options)
        after = self._commit(view, committed, token)
        outcome = StepOutcome(
            committed, rows.predicted, score, view.window_start, canvas.step[view.slots] == 0, importance
        )
        canvas.step[view.slots] += 1
        self._plan(after, outcome, [r.options.policy for r in self._requests(rows)])
        return self._emit(after, committed)

    def _requests(self, rows: StepRows) -> list[Request]:
        return [self.canvas.requests[s] for s in rows.slots]

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
