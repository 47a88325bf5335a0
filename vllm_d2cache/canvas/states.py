"""Slot-indexed state of every running request: tokens, masks, and what the next step is to refresh."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from vllm_d2cache.canvas.request import Request
from vllm_d2cache.canvas.standing import Standing
from vllm_d2cache.canvas.traits import FamilyTraits
from vllm_d2cache.canvas.view import CanvasView, OptionColumns
from vllm_d2cache.ops.columns import FirstColumns
from vllm_d2cache.ops.host import Writes
from vllm_d2cache.ops.texts import COUNTS, Edits, Texts, commit_texts, emit_texts, read_texts
from vllm_d2cache.options.request import SCORES, RequestOptions

# Exact in float32, and more than any text has slots.
_MOST_STEPS = 1 << 24


class BatchTexts(NamedTuple):
    """What the host knows of the texts of a batch, and no step changes."""

    requests: list[Request]
    prompt_lens: list[int]
    lengths: list[int]  # T of each
    row_budgets: list[int]
    width: int  # G, the widest
    most_emitted: int  # tokens that a step hands out of one of them
    used: frozenset[str]  # see CanvasView
    ordered: bool  # whether some text is written from left to right
    one_window: bool  # see CanvasView
    one_commit: bool  # likewise


class CanvasStates:
    """Device tensors with one line for each slot, and the host's records beside them.

    Args:
        num_slots: requests that can run at a time.
        max_len: most positions a request can have.
    """

    def __init__(self, num_slots: int, max_len: int, device: torch.device, traits: FamilyTraits) -> None:
        self.traits = traits
        self.device = device
        self.requests: dict[int, Request] = {}
        self.unseen: set[int] = set()  # slots with positions that no step has computed yet
        # Slots whose plan says more than what to refresh. Of all others the tables of plans hold what goes without
        # saying: nothing is observed, and all may be committed.
        self.told: set[int] = set()
        self._standing = Standing(self._batch)
        # The texts read or written last, and whose they are: read again only when other requests have a step.
        self._latest: tuple[list[int], CanvasView] | None = None
        self._first_columns = FirstColumns()

        def table(dtype: torch.dtype, *width: int) -> torch.Tensor:
            return torch.zeros(num_slots, *width, dtype=dtype, device=device)

        self.tokens = table(torch.int32, max_len + 1)  # the last column is no position of a text
        self.refresh = table(torch.bool, max_len)  # by position
        # By canvas slot.
        self.masked, self.terminal = table(torch.bool, max_len), table(torch.bool, max_len)
        self.observe, self.eligible = table(torch.bool, max_len), table(torch.bool, max_len)
        self.counts = torch.zeros(len(COUNTS), num_slots, dtype=torch.int64, device=device)
        self.prompt_len, self.canvas_len, self.step, self.window_step, self.emitted, self.held, _ = self.counts
        self.seed = table(torch.int64)
        self.sampling = table(torch.float32, 3)  # temperature, top_p, top_k
        self.row_budget = table(torch.int32)
        self.numbers = table(torch.float32, len(OptionColumns._fields))
        self.stop_ids = torch.full((num_slots, 1), -1, dtype=torch.int32, device=device)

    def add(self, slot: int, request: Request, prompt: np.ndarray, emitted: int, writes: Writes | None = None) -> None:
        """Give ``slot`` to a request: its prompt and a canvas of masks.

        Args:
            prompt: [P] token ids.
            emitted: tokens already handed out before a preemption; they are decoded again but not emitted again.
            writes: what it needs of the host is put here; nothing may read the slot before they are sent. None = they
                are sent at once.
        """
        if writes is None:
            writes = Writes(self.device)
            self.add(slot, request, prompt, emitted, writes)
            writes.send()
            return
        p, g, t = request.prompt_len, request.canvas_len, request.length
        self.requests[slot], self._latest = request, None
        self.unseen.add(slot)
        self.told.add(slot)  # of whoever had the slot before
        self._standing.forget()
        self._set_stop_ids(slot, request.sampling.stop_token_ids, writes)
        self.masked[slot], self.terminal[slot] = False, False
        canvas = np.full(g, self.traits.mask_token_id) if not request.given else self._set_given(slot, request, writes)
        if not request.given:
            self.masked[slot, :g] = True
        writes.put(self.tokens[slot, :t], np.concatenate([prompt, canvas]))
        self.emitted[slot] = emitted
        self.step[slot] = self.window_step[slot] = 0
        self.held[slot] = False
        self.prompt_len[slot], self.canvas_len[slot] = p, g
        sampling, options = request.sampling, request.options
        self.seed[slot], self.row_budget[slot] = sampling.seed, request.row_budget
        # The nucleus that shapes confidences also bounds what may be sampled.
        top_p = min(sampling.top_p, options.confidence_top_p) if sampling.temperature else options.confidence_top_p
        top_k = sampling.top_k if sampling.temperature else 0
        writes.put(self.sampling[slot], [sampling.temperature, top_p, top_k])
        writes.put(self.numbers[slot], _option_numbers(options, g))

    def remove(self, slot: int) -> None:
        """Forget the request in ``slot``."""
        del self.requests[slot]
        self.unseen.discard(slot)
        self.told.discard(slot)
        self._latest = None
        self._standing.forget()

    def _set_given(self, slot: int, request: Request, writes: Writes) -> np.ndarray:
        """[G] token ids of a canvas with the tokens the request gives; from then on they are like committed ones."""
        given = np.array(request.given)
        fixed = given >= 0
        writes.put(self.masked[slot, : len(given)], ~fixed)
        writes.put(self.terminal[slot, : len(given)], fixed & np.isin(given, request.sampling.stop_token_ids))
        return np.where(fixed, given, self.traits.mask_token_id)

    def _set_stop_ids(self, slot: int, stop_ids: tuple[int, ...], writes: Writes) -> None:
        missing = len(stop_ids) - self.stop_ids.shape[1]
        if missing > 0:
            self.stop_ids = torch.nn.functional.pad(self.stop_ids, (0, missing), value=-1)
        self.stop_ids[slot] = -1
        if stop_ids:
            writes.put(self.stop_ids[slot, : len(stop_ids)], stop_ids)

    def batch(self, slots: Sequence[int]) -> BatchTexts:
        """What no step changes of the texts in these slots."""
        return self._standing.of(slots)

    def _batch(self, slots: Sequence[int]) -> BatchTexts:
        requests = [self.requests[s] for s in slots]
        return BatchTexts(
            requests,
            [r.prompt_len for r in requests],
            [r.length for r in requests],
            [r.row_budget for r in requests],
            max(r.canvas_len for r in requests),
            max(r.most_emitted for r in requests),
            frozenset().union(*(r.options.used for r in requests)),
            any(r.options.ordered for r in requests),
            all(not r.options.block and r.options.window_length(r.canvas_len) == r.canvas_len for r in requests),
            all(r.options.tokens_per_step == 1 and not r.options.steps for r in requests),
        )

    def see(self, slots: Sequence[int]) -> None:
        """The step of these requests computes all that is left of their texts."""
        for slot in self.unseen.intersection(slots):
            self.requests[slot].computed = self.requests[slot].length
            self.unseen.discard(slot)

    def _flags(self, num_slots: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The tables of masks and of committed stop tokens, as wide as ops need them."""
        masked, terminal = self._first_columns.of(num_slots, self.masked, self.terminal)
        return masked, terminal

    def plans(self, num_positions: int, num_slots: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The tables of plans, as wide as ops need them: what to refresh, to observe, and what may be committed."""
        (refresh,) = self._first_columns.of(num_positions, self.refresh)
        observe, eligible = self._first_columns.of(num_slots, self.observe, self.eligible)
        return refresh, observe, eligible

    def view(self, slots: torch.Tensor, slots_host: Sequence[int]) -> CanvasView:
        """The texts of ``slots`` [R] as they are now, padded to the widest."""
        if self._latest is not None and self._latest[0] == slots_host:
            return self._latest[1]
        batch = self.batch(slots_host)
        tables = (*self._flags(batch.width), self.counts, self.numbers)
        texts = read_texts(slots, *tables, batch.width, self.traits.block_length)
        view = CanvasView(slots, texts, max(batch.lengths), batch.used, batch.one_window, batch.one_commit)
        self._latest = (list(slots_host), view)
        return view

    def commit(
        self,
        view: CanvasView,
        committed: torch.Tensor,
        token: torch.Tensor,
        revoked: torch.Tensor | None,
        revised: torch.Tensor | None = None,
        held: torch.Tensor | None = None,
    ) -> tuple[CanvasView, tuple[torch.Tensor, torch.Tensor]]:
        """Write the committed tokens, mask the revoked ones, and count the step.

        Args:
            committed, revoked: [R, G] bool.
            token: [R, G] int32, what is written where ``committed`` or ``revised``.
            revised: [R, G] bool, slots without a mask that are written over; None = none.
            held: [R] bool, whose window is not over even if it is full; None = nobody's.

        Returns:
            The texts after it, and [R] int64 each: how many were committed and revoked.
        """
        integers, floats, masked, _ = view.texts
        edits = Edits(committed, token, revoked, revised, held)
        tables = (self.tokens, *self._flags(masked.shape[1]), self.counts, self.stop_ids)
        numbers = (self.traits.mask_token_id, view.num_positions, self.traits.block_length)
        found = commit_texts(view.slots, integers, masked, edits, *tables, *numbers, view.one_window)
        after = view.after(Texts(found.integers, floats, found.masked, found.live))
        # Whoever selects lines of a view commits nothing to them.
        self._latest = (self._latest[0], after) if self._latest and self._latest[1] is view else None
        return after, found.changes

    def emit(
        self, view: CanvasView, provisional: torch.Tensor | None, held: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Hand out the newly contiguous tokens from the left: [R, G] int64 left-aligned, and [R] int32 how many.

        Args:
            view: after the commits.
            provisional: [R] bool, tokens of the current window may be taken back and are kept; None = nobody's.
            held: as in ``commit``.
        """
        integers, _, masked, live = view.texts
        keeps = (provisional, held)
        return emit_texts(view.slots, integers, view.window_start, masked, live, keeps, self.tokens, self.counts)


def _option_numbers(options: RequestOptions, canvas_len: int) -> list[float]:
    return [
        options.window_length(canvas_len),
        min(options.tokens_per_step, canvas_len),
        options.threshold,
        options.factor,
        SCORES.index(options.score),
        options.sigma,
        min(options.steps, _MOST_STEPS),
        options.longest_run(canvas_len),
    ]
