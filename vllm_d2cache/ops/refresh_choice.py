"""d2Cache's two stages: masked slots about to be decided, and context that receives attention.

docs/methods/d2cache.md, sections 3.3 to 3.7. Shapes: S slots, L positions at most, R rows (requests), T positions, G
canvas slots.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from vllm_d2cache.ops.canvas_columns import to_positions, to_slots
from vllm_d2cache.ops.columns import columns
from vllm_d2cache.ops.dispatch import dispatched

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
    """
    width, slot = masked.shape[1], columns(masked.shape[1], slots.device)
    _, canvas_len, _, _, _, length, *_ = integers.unsqueeze(2).unbind()
    start, first = outcome.window_start.unsqueeze(1), outcome.first.unsqueeze(1)
    update = outcome.predicted & (first | (latest[slots].unsqueeze(1) == 1))
    kept = memory[slots, :width].masked_fill(first, 0.0)
    kept = torch.where(update, outcome.score, kept)
    memory[:, :width].index_copy_(0, slots, kept)
    score = torch.where(slot < canvas_len, kept * density, 0.0)
    # A bonus of the best score puts the current window's slots before all others.
    behind_start = slot >= start
    in_window = behind_start & (slot < start + length)
    score = score + in_window * score.amax(1, keepdim=True)

    remaining = masked & live
    k = current_k[slots].unsqueeze(1)
    # The search window ends with the window that holds the k-th remaining slot.
    kth = (remaining.cumsum(1) < k).sum(1, keepdim=True).clamp(max=width - 1)
    eligible = remaining & behind_start & (slot < (kth // length + 1) * length)
    index = torch.where(eligible, score, -torch.inf).argsort(dim=1, descending=True, stable=True)
    return torch.zeros_like(eligible).scatter_(1, index, (slot < k).expand_as(index)) & eligible


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
    """Stage 2: the positions that hold the first ``rollout_p`` [R] float32 of the rollout's mass (section 3.5).

    Args:
        importance: [R, T] float32.
        certain: [R, T] bool, positions chosen already.
        selected: [R, G] bool, of stage 1.
        integers: [10, R] int64 (ops.texts.Texts).
        shift: a slot is read from the position that many in front of it.
    """
    prompt_len, canvas_len = integers[:2].unsqueeze(2).unbind()
    position = columns(importance.shape[1], importance.device)
    # The last prompt position, which a shifted family may have in stage 1, is a candidate of stage 2 all the same.
    candidates = (position < prompt_len + canvas_len) & ~(certain & (position >= prompt_len))
    share = _rollout_share(importance, candidates)
    chosen = certain | _head_of_mass(share, rollout_p)
    if shift:
        # The last prompt position serves slot 0 alone (section 3.5, point 3).
        chosen = torch.where(position == prompt_len - 1, selected[:, :1], chosen)
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
) -> tuple[torch.Tensor, torch.Tensor]:
    """Both stages and the commits, inflated: positions to refresh [R, T] bool, and slots to observe [R, G] bool.

    Args:
        slots: [R] int64.
        importance: [R, T] float32, of the rollout.
        selected: [R, G] bool, of stage 1; ``committed`` [R, G] bool, of the step.
        masked: [R, G] bool, after the commits.
        integers: [10, R] int64 (ops.texts.Texts).
        rollout_p: [S] float64; ``inflate_w``, ``latest``: [S] int64.
        shift: a slot is read from the position that many in front of it.
    """
    (prompt_len, canvas_len), total = integers[:2].unbind(), importance.shape[1]
    if shift:
        first = prompt_len - shift
        certain = to_positions(selected, first, canvas_len, total)
        certain = certain | to_positions(committed, prompt_len, canvas_len, total)
    else:
        first = prompt_len
        certain = to_positions(selected | committed, first, canvas_len, total)
    chosen, _ = select_context(importance, certain, selected, integers, rollout_p[slots].float(), shift)
    width = inflate_w[slots]
    refresh = inflate(chosen, width) if int(width.max()) > 1 else chosen  # neighbours have no gap
    computed = to_slots(refresh, first, canvas_len, masked.shape[1])
    return refresh, computed & masked & (latest[slots] == 1).unsqueeze(1)


def _rollout_share(importance: torch.Tensor, candidates: torch.Tensor) -> torch.Tensor:
    """[R, T] float32: importance as a share of the candidates' total, 0 elsewhere (section 3.5, point 2)."""
    mass = torch.where(candidates, importance, 0.0)
    # A running sum adds in position order, so that padding does not change the rounding.
    total = mass.cumsum(1, dtype=torch.float64)[:, -1:]
    return mass / (total.float() + 1e-9)


def _head_of_mass(share: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """[R, T] bool: the longest head of the descending list with mass at most p, and at least one position."""
    ordered, index = share.sort(dim=1, descending=True, stable=True)
    # Added in fp64 and then rounded: the sum must not depend on the order, and twelve times 1/48 is 1/4.
    head = ordered.cumsum(1, dtype=torch.float64).float() <= p.masked_fill(p >= 1, torch.inf).unsqueeze(1)
    head[:, 0].fill_(True)
    head &= ordered > 0
    return torch.zeros_like(head).scatter_(1, index, head)


def inflate(chosen: torch.Tensor, width: torch.Tensor) -> torch.Tensor:
    """[R, T] bool with gaps of at most ``width`` [R] between consecutive members filled (section 3.5, point 4)."""
    position = columns(chosen.shape[1], chosen.device)
    far = 1 << 30
    before = torch.where(chosen, position, -far).cummax(1).values
    after = torch.where(chosen, position, far).flip(1).cummin(1).values.flip(1)
    return chosen | (after - before <= width.clamp(max=_WIDEST_GAP).unsqueeze(1))
