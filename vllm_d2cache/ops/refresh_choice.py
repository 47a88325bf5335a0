"""d2Cache's two stages: masked slots about to be decided, and context that receives attention.

docs/methods/d2cache.md, sections 3.3 to 3.7. Shapes: S slots, L positions at most, R rows (requests), T positions, G
canvas slots.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch

from vllm_d2cache.ops.canvas_columns import at_positions, at_slots
from vllm_d2cache.ops.columns import columns, lines_of, no_cells, numbers_at, numbers_of, write_lines
from vllm_d2cache.ops.dispatch import dispatched
from vllm_d2cache.ops.text_columns import TextColumns, position_map, slot_map, text_columns, window_columns

_TRITON = "vllm_d2cache.ops.triton.refresh_choice"
# Wider than any gap in a text.
_WIDEST_GAP = 1 << 20


class Outcome(NamedTuple):
    """What a step did, as far as stage 1 reads it."""

    predicted: torch.Tensor  # [R, G] bool, slots with a score
    score: torch.Tensor  # [R, G] float32, confidences
    first: torch.Tensor  # [R] bool, the request's first step
    window_start: torch.Tensor  # [R] int64, the window in which it committed


@dispatched(_TRITON)
def select_masked(
    slots: torch.Tensor,
    memory: torch.Tensor,
    latest: torch.Tensor,
    current_k: torch.Tensor,
    density: torch.Tensor,
    integers: torch.Tensor,
    masked: torch.Tensor,
    live: torch.Tensor,
    outcome: Outcome,
    follows: bool = True,
    fresh: bool = True,
    one_window: bool = False,
) -> torch.Tensor:
    """Stage 1 [R, G] bool: the ``current_k`` masked slots with the best confidence times density (section 3.3).

    Args:
        slots: [R] int64.
        memory: [S, L] float32 by canvas slot, confidences (section 3.7); written.
        latest: [S] int64, 1 where the memory follows the latest confidences, else it keeps those of the first step.
        current_k: [S] int64.
        density: [R, G] float32, of known text around each slot.
        integers: [10, R] int64 (ops.texts.Texts).
        masked, live: [R, G] bool, after the step's commits.
        follows, fresh: some request's ``latest`` may be 1; this may have been some request's first step. A kernel reads
            each one's own anyway.
        one_window: the window of each of these texts is its whole canvas. A kernel asks each one's window anyway.
    """
    _, canvas_len, _, _, _, length, *_ = numbers_of(integers)
    width = masked.shape[1]
    start = (0,) * len(length) if one_window else tuple(outcome.window_start.tolist())
    window = window_columns(start, width, length, canvas_len, slots.device)
    kept = lines_of(memory, slots, width)
    if follows or fresh:
        first = outcome.first.unsqueeze(1)
        update = outcome.predicted & (first | (latest.take(slots).unsqueeze(1) == 1) if follows else first)
        kept = torch.where(update, outcome.score, kept.masked_fill_(first, 0.0))
        write_lines(memory, slots, kept)
    score = kept * density  # 0 behind a canvas, as the density is
    # A bonus of the best score puts the current window's slots before all others.
    score = torch.addcmul(score, window.ones, score.amax(1, keepdim=True))

    eligible, k = masked & live, numbers_at(current_k, slots)
    if not one_window:
        # The search window ends with the window that holds the k-th remaining slot: before a slot's own window there
        # are fewer of them than k.
        before = eligible.cumsum(1).add_(eligible, alpha=-1).gather(1, window.begin)
        eligible = eligible & window.behind_start & (before < _counts(k, slots.device))
    index = torch.where(eligible, score, -torch.inf).argsort(dim=1, descending=True, stable=True)
    best = _first_k(k, width, slots.device)
    return best.scatter(1, index, best).logical_and_(eligible)  # all of it is written over


@lru_cache(maxsize=8)
def _counts(numbers: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """[R, 1] int64. Shared: it is never written."""
    return torch.tensor(numbers, dtype=torch.int64, device=device).unsqueeze(1)


@lru_cache(maxsize=8)
def _first_k(numbers: tuple[int, ...], width: int, device: torch.device) -> torch.Tensor:
    """[R, width] bool: the first ``numbers`` columns. Shared: it is never written."""
    return columns(width, device) < _counts(numbers, device)


class Context(NamedTuple):
    """Stage 2, before inflation."""

    chosen: torch.Tensor  # [R, T] bool, with what was certain
    share: torch.Tensor  # [R, T] float32, of the rollout's mass


def select_context(
    importance: torch.Tensor,
    certain: torch.Tensor,
    selected: torch.Tensor,
    integers: torch.Tensor,
    rollout_p: torch.Tensor,
    shift: int,
) -> Context:
    """Stage 2: the positions that hold the first ``rollout_p`` [R] of the rollout's mass (section 3.5).

    Args:
        importance: [R, T] float32, 0 behind a text.
        certain: [R, T] bool, positions chosen already.
        selected: [R, G] bool, of stage 1.
        integers: [10, R] int64 (ops.texts.Texts).
        shift: a slot is read from the position that many in front of it.
    """
    prompt_len, canvas_len, *_ = numbers_of(integers)
    text = text_columns(prompt_len, importance.shape[1], canvas_len, importance.device)
    return _context(importance, certain, selected, text, numbers_of(rollout_p), shift)


def _context(
    importance: torch.Tensor,
    certain: torch.Tensor,
    selected: torch.Tensor,
    text: TextColumns,
    rollout_p: tuple[float, ...],
    shift: int,
) -> Context:
    """As :func:`select_context` says."""
    # The last prompt position, which a shifted family may have in stage 1, is a candidate of stage 2 all the same.
    share = _rollout_share(importance, certain & text.behind_prompt if shift else certain)
    chosen = _head_of_mass(share, rollout_p).logical_or_(certain)
    if shift:
        # The last prompt position serves slot 0 alone (section 3.5, point 3).
        last = columns(chosen.shape[1], chosen.device) == text.last_of_prompt
        chosen = torch.where(last, selected[:, :1], chosen)
    return Context(chosen, share)


@dispatched(_TRITON)
def choose_refresh(
    slots: torch.Tensor,
    importance: torch.Tensor,
    selected: torch.Tensor,
    committed: torch.Tensor,
    masked: torch.Tensor,
    integers: torch.Tensor,
    rollout_p: torch.Tensor,
    inflate_w: torch.Tensor,
    latest: torch.Tensor,
    shift: int,
    inflates: bool = True,
    follows: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Both stages and the commits, inflated: positions to refresh [R, T] bool, and slots to observe [R, G] bool.

    Args:
        slots: [R] int64.
        importance: [R, T] float32, of the rollout; 0 behind a text.
        selected: [R, G] bool, of stage 1; ``committed`` [R, G] bool, of the step.
        masked: [R, G] bool, after the commits.
        integers: [10, R] int64 (ops.texts.Texts).
        rollout_p: [S] float64; ``inflate_w``, ``latest``: [S] int64.
        shift: a slot is read from the position that many in front of it.
        inflates, follows: some request's ``inflate_w`` may be more than 1, its ``latest`` may be 1. A kernel reads each
            one's own anyway.
    """
    prompt_len, canvas_len, *_ = numbers_of(integers)
    device, total, width = slots.device, importance.shape[1], masked.shape[1]
    first, read = tuple(p - shift for p in prompt_len), selected if shift else selected | committed
    certain = at_positions(read, position_map(first, total, canvas_len, width, device))
    if shift:
        certain = certain | at_positions(committed, position_map(prompt_len, total, canvas_len, width, device))
    text = text_columns(prompt_len, total, canvas_len, device)
    refresh = _context(importance, certain, selected, text, numbers_at(rollout_p, slots), shift).chosen
    if inflates and int((gaps := inflate_w.index_select(0, slots)).max()) > 1:  # neighbours have no gap
        refresh = inflate(refresh, gaps)
    if not follows:
        return refresh, no_cells(*masked.shape, device)
    computed = at_slots(refresh, slot_map(first, width, canvas_len, total, device))
    return refresh, computed & masked & (latest.take(slots.unsqueeze(1)) == 1)


def _rollout_share(importance: torch.Tensor, certain: torch.Tensor) -> torch.Tensor:
    """[R, T] float32: importance as a share of the total of what is not ``certain``, 0 there (section 3.5, point 2)."""
    mass = importance.masked_fill(certain, 0.0)
    # A running sum adds in position order, so that padding does not change the rounding.
    total = mass.cumsum(1, dtype=torch.float64)[:, -1:]
    return mass / (total.float() + 1e-9)


def _head_of_mass(share: torch.Tensor, p: tuple[float, ...]) -> torch.Tensor:
    """[R, T] bool: the longest head of the descending list with mass at most p, and at least one position."""
    ordered, index = share.sort(dim=1, descending=True, stable=True)
    most = _bounds(p, share.shape[1], share.device)
    # Added in fp64 and then rounded: the sum must not depend on the order, and twelve times 1/48 is 1/4.
    head = (ordered.cumsum(1, dtype=torch.float64).float() <= most).logical_and_(ordered > 0)
    return head.scatter(1, index, head)  # all of it is written over


@lru_cache(maxsize=8)
def _bounds(p: tuple[float, ...], width: int, device: torch.device) -> torch.Tensor:
    """[R, width] float32: ``p``, or infinity in the first column and where that is all of the mass.

    Shared: it is never written.
    """
    bound = torch.tensor(p, dtype=torch.float32, device=device).unsqueeze(1)
    return bound.masked_fill((bound >= 1) | (columns(width, device) == 0), torch.inf)


def inflate(chosen: torch.Tensor, width: torch.Tensor) -> torch.Tensor:
    """[R, T] bool with gaps of at most ``width`` [R] between consecutive members filled (section 3.5, point 4)."""
    position = columns(chosen.shape[1], chosen.device)
    far = 1 << 30
    before = torch.where(chosen, position, -far).cummax(1).values
    after = torch.where(chosen, position, far).flip(1).cummin(1).values.flip(1)
    return chosen | (after - before <= width.clamp(max=_WIDEST_GAP).unsqueeze(1))
