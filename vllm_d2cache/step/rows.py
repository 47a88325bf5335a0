"""Which rows a step has: the plans of the last one, packed."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch

from vllm_d2cache.canvas.rows import StepRows
from vllm_d2cache.canvas.states import CanvasStates
from vllm_d2cache.canvas.view import CanvasView, canvas_to_positions, positions_to_canvas
from vllm_d2cache.ops.host import upload
from vllm_d2cache.ops.packing import pack_columns


def select_rows(
    canvas: CanvasStates, slots: torch.Tensor, slots_host: Sequence[int], observes_all: Sequence[bool], padded: bool
) -> StepRows:
    """The rows of a step of these requests.

    Args:
        slots: [R] int64 on the device; ``slots_host`` the same on the host.
        observes_all: of each request, whether statistics of all masked slots that are computed are wanted.
        padded: give each request as many rows as it can need at most, and do not wait for the device to learn how many
            it does need. What the step decides is the same.
    """
    requests = [canvas.requests[s] for s in slots_host]
    view = canvas.view(slots, slots_host)
    width, shift = view.masked.shape[1], canvas.traits.logit_shift
    refresh = canvas.refresh[slots, : view.num_positions] & view.in_text
    eligible = view.in_window & canvas.eligible[slots, :width]
    if any(r.options.ordered for r in requests):
        refresh, eligible = _with_lead(view, refresh, eligible, shift)
    observe = canvas.observe[slots, :width]
    if any(observes_all):
        observe = observe | upload(observes_all, torch.bool, canvas.device).unsqueeze(1)
    predictable = positions_to_canvas(refresh, view, shift) & view.open
    predicted = predictable & (eligible | observe)
    refreshed = refresh.sum(1)

    if padded:
        counts = [r.most_rows for r in requests]
        # A predicted slot has a row of its own.
        predictions = [min(r.most_rows, r.canvas_len) for r in requests]
    else:
        # The one place of a step that waits for the device: how many rows, and how many of them lead to logits.
        # (Mechanisms that need exact rows, logit edits and some decoders wait once more.)
        counts, predictions = torch.stack([refreshed, predicted.sum(1)]).tolist()
    numbers = [*_starts(counts), *counts, *_starts(predictions), *predictions]
    starts, places, prediction_starts, prediction_places = upload(numbers, torch.int64, canvas.device).view(4, -1)
    request, positions, row_of = pack_columns(refresh, starts, places, sum(counts))
    who, slot, _ = pack_columns(predicted, prediction_starts, prediction_places, sum(predictions))
    live, positions = positions >= 0, positions.clamp(min=0)
    return StepRows(
        view=view,
        slots=list(slots_host),
        prompt_lens=[r.prompt_len for r in requests],
        lengths=[r.length for r in requests],
        counts=counts,
        refreshed=refreshed,
        full=[n == r.length and not padded for n, r in zip(counts, requests, strict=True)],
        positions=positions,
        input_ids=canvas.tokens[slots[request], positions],
        request=request,
        live=live,
        row_of=row_of,
        candidates=predictable & eligible,
        predicted=predicted,
        predicted_index=(who, torch.where(slot >= 0, slot, width)),
        logits_rows=row_of[who, (view.prompt_len[who] + slot - shift).clamp(min=0)].clamp(min=0),
        extra=[0] * len(requests),
    )


def _with_lead(
    view: CanvasView, refresh: torch.Tensor, eligible: torch.Tensor, shift: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """``refresh`` [R, T] and ``eligible`` [R, G] of requests whose tokens are committed from left to right.

    Their leftmost mask can always be committed, whatever the policy would recompute; slots that are further away
    than a step goes cannot.
    """
    run, lead = view.options.longest_run.unsqueeze(1), view.lead.unsqueeze(1)
    at_lead = (view.slot_index == lead) & (run > 0)
    eligible = (eligible & ((view.slot_index < lead + run) | (run == 0))) | at_lead
    return refresh | canvas_to_positions(at_lead, view, shift), eligible


def _starts(counts: list[int]) -> list[int]:
    """Where each of stretches of these lengths begins."""
    return list(accumulate(counts[:-1], initial=0))
