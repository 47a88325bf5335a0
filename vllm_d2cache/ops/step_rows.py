"""Which positions a step computes and which canvas slots it predicts, and both packed side by side.

Shapes: S slots, L positions at most, R rows (requests in this step), T positions, G canvas slots.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from vllm_d2cache.ops.canvas_columns import at_positions, at_slots
from vllm_d2cache.ops.columns import cells_of, columns, everybody, first_columns, lines_of, numbers_of, write_lines
from vllm_d2cache.ops.dispatch import dispatched
from vllm_d2cache.ops.packing import pack_columns
from vllm_d2cache.ops.text_columns import position_map, slot_map, text_columns, window_columns

_TRITON = "vllm_d2cache.ops.triton.step_rows"


class Choice(NamedTuple):
    """What a step computes."""

    refresh: torch.Tensor  # [R, T] bool, positions
    candidates: torch.Tensor  # [R, G] bool, slots that may be committed
    predicted: torch.Tensor  # [R, G] bool, slots whose statistics are taken
    sums: torch.Tensor  # [2, R] int64, how many positions and how many predicted slots


class PackedRows(NamedTuple):
    """The same, packed into as many places as the host has set aside: N for positions, n for predicted slots."""

    request: torch.Tensor  # [N] int64, row of the batch
    positions: torch.Tensor  # [N] int64, 0 where a place is left over
    live: torch.Tensor  # [N] bool, not left over
    input_ids: torch.Tensor  # [N] int32
    row_of: torch.Tensor  # [R, T] int64, place of each chosen position
    who: torch.Tensor  # [n] int64, row of the batch
    slot: torch.Tensor  # [n] int64, G where a place is left over
    logits_rows: torch.Tensor  # [n] int64 into N, of the position that each slot is read from
    place: torch.Tensor  # [R, G] int64, place of each predicted slot


@dispatched(_TRITON)
def choose_rows(
    slots: torch.Tensor,
    refresh: torch.Tensor,
    observe: torch.Tensor,
    eligible: torch.Tensor,
    integers: torch.Tensor,
    masked: torch.Tensor,
    live: torch.Tensor,
    observes_all: torch.Tensor | None,
    revises: torch.Tensor | None,
    ordered: bool,
    shift: int,
    num_positions: int,
    told: bool = True,
    one_window: bool = False,
) -> Choice:
    """What the plans of the last step come to now.

    Args:
        slots: [R] int64.
        refresh: [S, L] bool by position, of the plans; ``observe`` and ``eligible`` [S, L] bool by canvas slot.
        integers: [10, R] int64 (ops.texts.Texts).
        masked, live: [R, G] bool.
        observes_all: [R] bool, whether statistics of all masked slots that are computed are wanted; None = nobody's.
        revises: [R] bool, whether tokens of the window may be written over: statistics of all of it that is computed
            are wanted; None = nobody's.
        ordered: whether some request commits from left to right, as its ``longest_run`` > 0 says. The leftmost mask
            of such a text can always be committed, whatever the policy would recompute; slots that are further away
            than a step goes cannot.
        shift: a slot is read from the position that many in front of it.
        num_positions: T.
        told: some of these plans observes slots, or names those that may be committed. A kernel looks it up anyway.
        one_window: the window of each of these texts is its whole canvas. A kernel asks each one's window anyway.
    """
    prompt_len, canvas_len, start, _, _, window, *_ = numbers_of(integers)
    width, device, open_slots = masked.shape[1], slots.device, masked & live
    first, text = tuple(p - shift for p in prompt_len), text_columns(prompt_len, num_positions, canvas_len, device)
    chosen = lines_of(refresh, slots, num_positions) & text.inside
    inside = may_go = window_columns(start, width, window, canvas_len, device).inside
    if told:
        may_go = inside & lines_of(eligible, slots, width)
    if ordered:
        may_go, at_lead = _near_lead(open_slots, may_go, integers[9].unsqueeze(1))
        chosen = chosen | at_positions(at_lead, position_map(first, num_positions, canvas_len, width, device))
    computed = at_slots(chosen, slot_map(first, width, canvas_len, num_positions, device))
    predictable = computed & open_slots
    if one_window and not told and not ordered:
        candidates = predicted = predictable  # all of it may go
    else:
        candidates, wanted = predictable & may_go, may_go
        if told:
            wanted = wanted | lines_of(observe, slots, width)
        if observes_all is not None:
            wanted = wanted | observes_all.unsqueeze(1)
        predicted = predictable & wanted
    if revises is not None:
        predicted = predicted | (computed & inside & revises.unsqueeze(1))
    return Choice(chosen, candidates, predicted, torch.cat([chosen.sum(1), predicted.sum(1)]).view(2, -1))


def _near_lead(open_slots: torch.Tensor, may_go: torch.Tensor, run: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[R, G] bool each: what may go of texts written from left to right (``run`` [R, 1] int64 > 0), and their leads."""
    slot = columns(open_slots.shape[1], open_slots.device)
    lead = open_slots.max(1, keepdim=True).indices  # the leftmost of equals
    at_lead = (slot == lead) & (run > 0)
    return (may_go & ((slot < lead + run) | (run == 0))) | at_lead, at_lead


@dispatched(_TRITON)
def pack_rows(
    slots: torch.Tensor,
    chosen: torch.Tensor,
    predicted: torch.Tensor,
    counts: torch.Tensor,
    tokens: torch.Tensor,
    first: torch.Tensor,
    num_rows: int,
    num_predictions: int,
    exact: bool = False,
) -> PackedRows:
    """Give the chosen positions and the predicted slots of each request its places (ops.packing).

    Args:
        slots: [R] int64.
        chosen: [R, T] bool.
        predicted: [R, G] bool.
        counts: [2, R] int64, how many places each request has: for positions, then for slots.
        tokens: [S, L] int32 by position.
        first: [R] int64, the position from which slot 0 is read.
        num_rows, num_predictions: N and n.
        exact: they are as many as are chosen and predicted, of each request.
    """
    if exact and slots.device.type == "cpu":  # nowhere else is it known without a wait how much nonzero finds
        return _pack_all(slots, chosen, predicted, tokens, first)
    starts, (places, slot_places) = (counts.cumsum(1) - counts).unbind(), counts.unbind()
    request, positions, row_of = pack_columns(chosen, starts[0], places, num_rows)
    who, slot, place = pack_columns(predicted, starts[1], slot_places, num_predictions)
    live, positions = positions >= 0, positions.clamp(min=0)
    return PackedRows(
        request,
        positions,
        live,
        tokens[slots[request], positions],
        row_of,
        who,
        torch.where(slot >= 0, slot, predicted.shape[1]),
        row_of[who, (first[who] + slot).clamp(min=0)].clamp(min=0),
        place,
    )


def _pack_all(
    slots: torch.Tensor, chosen: torch.Tensor, predicted: torch.Tensor, tokens: torch.Tensor, first: torch.Tensor
) -> PackedRows:
    """As :func:`pack_rows` where places are as many as are marked: then what is marked says it all."""
    request, positions = chosen.nonzero().unbind(1)
    who, slot = predicted.nonzero().unbind(1)
    row_of, place = (marked.flatten().cumsum(0).sub_(1).view(marked.shape) for marked in (chosen, predicted))
    live = everybody(request.shape[0], slots.device)
    input_ids = tokens.take(cells_of(slots.take(request), positions, tokens))
    read = row_of.take(cells_of(who, first.take(who).add_(slot), row_of))
    return PackedRows(request, positions, live, input_ids, row_of, who, slot, read, place)


@dispatched(_TRITON)
def store_plan(
    slots: torch.Tensor,
    refresh: torch.Tensor,
    observe: torch.Tensor | None,
    candidates: torch.Tensor | None,
    tables: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
) -> None:
    """Keep plans until the next step.

    Args:
        slots: [R] int64.
        refresh: [R, T] bool.
        observe, candidates: [R, G] bool; no candidates = all may go. Without ``observe`` both tables stay as they are.
        tables: [S, L] bool of each, in that order; written.
    """
    write_lines(tables[0], slots, refresh)
    if observe is None:
        return
    write_lines(tables[1], slots, observe)
    if candidates is None:
        first_columns(tables[2], observe.shape[1]).index_fill_(0, slots, True)
    else:
        write_lines(tables[2], slots, candidates)


@dispatched(_TRITON)
def spread(
    predicted: torch.Tensor,
    place: torch.Tensor,
    score: torch.Tensor,
    token: torch.Tensor,
    entropy: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Statistics of predicted slots over all slots, 0 elsewhere: scores and tokens [R, G], and entropies or None.

    Args:
        predicted: [R, G] bool.
        place: [R, G] int64, where each predicted slot stands in the others; -1 or any such place for another slot.
        score: [n] float32.
        token: [n] int64; they come out as int32.
        entropy: [n] float32, or None.
    """
    if not score.shape[0]:
        nothing = score.new_zeros(predicted.shape)
        return nothing, nothing.int(), None if entropy is None else nothing
    # A slot that is not predicted has the place in front of its own or, at the left, -1, which is the last one.
    scores, tokens = torch.where(predicted, score.take(place), 0.0), torch.where(predicted, token.take(place).int(), 0)
    return scores, tokens, None if entropy is None else torch.where(predicted, entropy.take(place), 0.0)


@dispatched(_TRITON)
def page_slots(
    table: torch.Tensor,
    request: torch.Tensor,
    positions: torch.Tensor,
    live: torch.Tensor,
    block_size: int,
    exact: bool = False,
) -> torch.Tensor:
    """[N] int64: flat KV slot of each row, -1 where ``live`` [N] is False.

    Args:
        table: [R, blocks] int, KV block ids of each request.
        request, positions: [N] int64.
        exact: all of ``live`` is True. A kernel asks each row anyway.
    """
    block = table.take(cells_of(request, positions // block_size, table))
    slots = torch.add(positions % block_size, block, alpha=block_size)
    return slots if exact else torch.where(live, slots, -1)
