"""Slot-indexed state of every running request: tokens, masks, and what the next step is to refresh."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from vllm_d2cache.canvas.request import Request
from vllm_d2cache.canvas.rows import StepResult
from vllm_d2cache.canvas.traits import FamilyTraits
from vllm_d2cache.canvas.view import CanvasView, OptionColumns, canvas_to_positions, first_window, live_slots
from vllm_d2cache.options.request import SCORES, RequestOptions

# Exact in float32, and more than any text has slots.
_MOST_STEPS = 1 << 24
_INTEGERS = ("window", "tokens_per_step", "score", "steps", "longest_run")


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

        def table(dtype: torch.dtype, *width: int) -> torch.Tensor:
            return torch.zeros(num_slots, *width, dtype=dtype, device=device)

        self.tokens = table(torch.int32, max_len)
        self.refresh = table(torch.bool, max_len)  # by position
        # By canvas slot.
        self.masked, self.terminal = table(torch.bool, max_len), table(torch.bool, max_len)
        self.observe, self.eligible = table(torch.bool, max_len), table(torch.bool, max_len)
        self.emitted, self.step, self.window_step = (table(torch.int64) for _ in range(3))
        self.held, self.held_start = table(torch.bool), table(torch.int64)  # a window that is not over, though full
        self.prompt_len, self.canvas_len, self.seed = (table(torch.int64) for _ in range(3))
        self.sampling = table(torch.float32, 3)  # temperature, top_p, top_k
        self.numbers = table(torch.float32, len(OptionColumns._fields))
        self.stop_ids = torch.full((num_slots, 1), -1, dtype=torch.int32, device=device)

    def add(self, slot: int, request: Request, prompt: np.ndarray, emitted: int) -> None:
        """Give ``slot`` to a request: its prompt and a canvas of masks.

        Args:
            prompt: [P] token ids.
            emitted: tokens already handed out before a preemption; they are decoded again but not emitted again.
        """
        p, g, t = request.prompt_len, request.canvas_len, request.length
        request.computed = 0
        self.requests[slot] = request
        self.tokens[slot, :p] = torch.from_numpy(np.ascontiguousarray(prompt, dtype=np.int32)).to(self.device)
        self.tokens[slot, p:t] = self.traits.mask_token_id
        self.masked[slot], self.terminal[slot] = False, False
        self.masked[slot, :g] = True
        self._set_stop_ids(slot, request.sampling.stop_token_ids)
        if request.given:
            self._set_given(slot, request)
        self.emitted[slot] = emitted
        self.step[slot] = self.window_step[slot] = 0
        self.held[slot] = False
        self.prompt_len[slot], self.canvas_len[slot] = p, g
        sampling, options = request.sampling, request.options
        self.seed[slot] = sampling.seed
        # The nucleus that shapes confidences also bounds what may be sampled.
        top_p = min(sampling.top_p, options.confidence_top_p) if sampling.temperature else options.confidence_top_p
        top_k = sampling.top_k if sampling.temperature else 0
        self.sampling[slot] = torch.tensor([sampling.temperature, top_p, float(top_k)])
        self.numbers[slot] = torch.tensor(_option_numbers(options, g))

    def remove(self, slot: int) -> None:
        """Forget the request in ``slot``."""
        del self.requests[slot]

    def _set_given(self, slot: int, request: Request) -> None:
        """Write the tokens the request gives; from then on they are like committed ones."""
        p, g = request.prompt_len, request.canvas_len
        given = torch.tensor(request.given, dtype=torch.int32, device=self.device)
        fixed = given >= 0
        self.tokens[slot, p : p + g][fixed] = given[fixed]
        self.masked[slot, :g] = ~fixed
        self.terminal[slot, :g] = fixed & torch.isin(given, self.stop_ids[slot])

    def _set_stop_ids(self, slot: int, stop_ids: tuple[int, ...]) -> None:
        missing = len(stop_ids) - self.stop_ids.shape[1]
        if missing > 0:
            self.stop_ids = torch.nn.functional.pad(self.stop_ids, (0, missing), value=-1)
        self.stop_ids[slot] = -1
        self.stop_ids[slot, : len(stop_ids)] = torch.tensor(stop_ids, dtype=torch.int32)

    def view(self, slots: torch.Tensor, slots_host: Sequence[int]) -> CanvasView:
        """The texts of ``slots`` [R] as they are now, padded to the widest."""
        requests = [self.requests[s] for s in slots_host]
        width = max(r.canvas_len for r in requests)
        masked, prompt_len = self.masked[slots, :width], self.prompt_len[slots]
        options = _columns(self.numbers[slots])
        live, start = self._window(masked, self.terminal[slots, :width], prompt_len, options.window)
        if any(r.revises for r in requests):
            start = torch.where(self.held[slots], self.held_start[slots], start)
        return CanvasView(
            slots,
            prompt_len,
            self.canvas_len[slots],
            masked,
            live,
            start,
            self.step[slots],
            self.window_step[slots],
            max(r.length for r in requests),
            options,
            frozenset().union(*(r.options.used for r in requests)),
        )

    def _window(
        self, masked: torch.Tensor, terminal: torch.Tensor, prompt_len: torch.Tensor, window: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Live slots [R, G] and the current window's start [R], by what is masked."""
        block = self.traits.block_length
        live = live_slots(terminal, prompt_len, block)
        return live, first_window(masked, live, window, None if block is None else prompt_len)

    def commit(
        self,
        view: CanvasView,
        committed: torch.Tensor,
        token: torch.Tensor,
        revoked: torch.Tensor | None,
        revised: torch.Tensor | None = None,
        held: torch.Tensor | None = None,
    ) -> CanvasView:
        """Write the committed tokens, mask the revoked ones, and count the step; returns the texts after it.

        Args:
            committed, revoked: [R, G] bool.
            token: [R, G] int32, what is written where ``committed`` or ``revised``.
            revised: [R, G] bool, slots without a mask that are written over; None = none.
            held: [R] bool, whose window is not over even if it is full; None = nobody's.
        """
        slots, width = view.slots, committed.shape[1]
        terminal = self.terminal[slots, :width]
        if revised is not None:
            committed, terminal = committed | revised, terminal & ~revised
        text = self.tokens[slots, : view.num_positions]
        text = torch.where(canvas_to_positions(committed, view), canvas_to_positions(token, view), text)
        stops = (token.unsqueeze(2) == self.stop_ids[slots].unsqueeze(1)).any(2)
        masked = view.masked & ~committed
        terminal = terminal | (stops & committed)
        if revoked is not None:
            text = torch.where(canvas_to_positions(revoked, view), self.traits.mask_token_id, text)
            masked |= revoked
            terminal &= ~revoked
        live, start = self._window(masked, terminal, view.prompt_len, view.options.window)
        if held is not None:
            start = torch.where(held, view.window_start, start)
            self.held[slots], self.held_start[slots] = held, start
        window_step = torch.where(start == view.window_start, view.window_step + 1, 0)
        self.tokens[slots, : view.num_positions] = text
        self.masked[slots, :width], self.terminal[slots, :width] = masked, terminal
        self.step[slots], self.window_step[slots] = view.step + 1, window_step
        return replace(view, masked=masked, live=live, window_start=start, step=view.step + 1, window_step=window_step)

    def emit(
        self,
        view: CanvasView,
        committed: torch.Tensor,
        revoked: torch.Tensor | None,
        provisional: torch.Tensor | None,
        revised: torch.Tensor | None = None,
        held: torch.Tensor | None = None,
    ) -> StepResult:
        """Hand out the newly contiguous tokens from the left.

        Args:
            view: after the commits.
            provisional: [R] bool, tokens of the current window may be taken back and are kept; None = nobody's.
            revised, held: as in ``commit``.
        """
        done = (~view.masked & view.in_canvas).to(torch.int8).cumprod(1).sum(1)
        if provisional is not None:
            unfinished = view.open.any(1) if held is None else view.open.any(1) | held
            done = torch.where(unfinished & provisional, torch.minimum(done, view.window_start), done)
        emitted = self.emitted[view.slots]
        fresh = (done - emitted).clamp(min=0)
        index = view.prompt_len.unsqueeze(1) + emitted.unsqueeze(1) + view.slot_index
        tokens = self.tokens[view.slots, : view.num_positions].gather(1, index.clamp(max=view.num_positions - 1))
        self.emitted[view.slots] = emitted + fresh
        return StepResult(tokens.long(), fresh.int(), committed, view.masked, revoked, revised)


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


def _columns(numbers: torch.Tensor) -> OptionColumns:
    column = dict(zip(OptionColumns._fields, numbers.unbind(1), strict=True))
    return OptionColumns(**{name: x.long() if name in _INTEGERS else x for name, x in column.items()})
