"""Which rows a step has: the plans of the last one, packed."""

from __future__ import annotations

from collections.abc import Sequence
from operator import eq

import torch

from vllm_d2cache.canvas.rows import StepRows
from vllm_d2cache.canvas.states import CanvasStates
from vllm_d2cache.ops.host import upload
from vllm_d2cache.ops.step_rows import choose_rows, pack_rows
from vllm_d2cache.step.decoding import Asks


def select_rows(
    canvas: CanvasStates, slots: torch.Tensor, slots_host: Sequence[int], asks: Asks, padded: bool
) -> StepRows:
    """The rows of a step of these requests.

    Args:
        slots: [R] int64 on the device; ``slots_host`` the same on the host.
        asks: of the decoders of these requests.
        padded: give each request as many rows as it can need at most, and do not wait for the device to learn how many
            it does need. What the step decides is the same.
    """
    batch = canvas.batch(slots_host)
    view, shift = canvas.view(slots, slots_host), canvas.traits.logit_shift
    integers, _, masked, live = view.texts
    plans, texts = canvas.plans(view.num_positions, masked.shape[1]), (integers, masked, live)
    wanted = (asks.observes, asks.revises, batch.ordered)
    told = not canvas.told.isdisjoint(slots_host)
    chosen = choose_rows(slots, *plans, *texts, *wanted, shift, view.num_positions, told, view.one_window)
    if padded:
        counts = [r.most_rows for r in batch.requests]
        # A predicted slot has a row of its own.
        predictions = [min(r.most_rows, r.canvas_len) for r in batch.requests]
    else:
        # The one place of a step that waits for the device: how many rows, and how many of them lead to logits.
        # (Mechanisms that need exact rows, logit edits and some decoders wait once more.)
        counts, predictions = chosen.sums.tolist()
    first, marks = view.prompt_len - shift if shift else view.prompt_len, (chosen.refresh, chosen.predicted)
    places = upload([counts, predictions], torch.int64, canvas.device) if padded else chosen.sums
    sizes = (sum(counts), sum(predictions))
    packed = pack_rows(slots, *marks, places, canvas.tokens, first, *sizes, not padded)
    refreshed, num_predicted = chosen.sums.unbind()
    return StepRows(
        view=view,
        slots=list(slots_host),
        prompt_lens=batch.prompt_lens,
        lengths=batch.lengths,
        visible=[r.visible for r in batch.requests],
        counts=counts,
        refreshed=refreshed,
        num_predicted=num_predicted,
        full=[False] * len(counts) if padded else list(map(eq, counts, batch.lengths)),
        positions=packed.positions,
        input_ids=packed.input_ids,
        request=packed.request,
        live=packed.live,
        row_of=packed.row_of,
        candidates=chosen.candidates,
        predicted=chosen.predicted,
        predicted_index=(packed.who, packed.slot),
        place=packed.place,
        logits_rows=packed.logits_rows,
        extra=[0] * len(counts),
        fresh=not canvas.unseen.isdisjoint(slots_host),
        exact=not padded,
    )
