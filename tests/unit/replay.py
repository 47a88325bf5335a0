"""Requests through the real Denoiser with every commit decided beforehand: shows what a policy makes of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from tests.unit.batches import hook_of
from vllm_d2cache.canvas.states import Request
from vllm_d2cache.canvas.view import FamilyTraits, SamplingSpec
from vllm_d2cache.mechanisms.drift import Drift, DriftHook, WatchedRows
from vllm_d2cache.mechanisms.hidden_keys import KeyChoice, KeysHook
from vllm_d2cache.mechanisms.row_exits import RowGate
from vllm_d2cache.mechanisms.stored_outputs import OutputHook
from vllm_d2cache.ops.row_stats import RowStats
from vllm_d2cache.options.server import ServerOptions
from vllm_d2cache.step.denoiser import Denoiser

MASK = 370


@dataclass(frozen=True)
class Replayed:
    """What the network was asked for in one step; lists are ascending."""

    refreshed: list[int]  # positions
    candidates: list[int]  # slots that could be committed
    keys: list[int] | None  # positions the rows attend to; None = all
    choice: KeyChoice | None
    stored: OutputHook | None
    exiting: RowGate | None
    watched: WatchedRows | None


def replay(
    options: dict[str, Any],
    prompt_len: int,
    canvas_len: int,
    moves: Sequence[dict[int, int]],
    shift: int = 0,
    entropies: Sequence[float] | None = None,
    drifts: Sequence[tuple[float, list[int]]] | None = None,
    num_layers: int = 3,
    confidences: Sequence[Sequence[float]] | None = None,
    left: Sequence[list[int]] | None = None,
) -> list[Replayed]:
    """Run a request whose step i commits ``moves[i]``: slot -> token.

    Args:
        options: by plain name.
        shift: logit shift of the family.
        entropies: of every row in step i, in nats.
        num_layers: of the network.
        confidences: in step i, of each canvas slot; those committed must be at least 0.5 and all others below. The
            default is 1 and 0.
        left: in step i, positions whose rows have left.
        drifts: in step i, the similarity to the step before and the most attended positions.
    """
    # A threshold between the two confidences below commits exactly what is asked for.
    chosen = ServerOptions({}).resolve({"sigma": 0.0, "threshold": 0.5, **options})
    traits = FamilyTraits(MASK, shift, num_layers=num_layers)
    denoiser = Denoiser(3, prompt_len + canvas_len + 2, torch.device("cpu"), traits, ServerOptions({}))
    denoiser.add(1, Request("r", prompt_len, canvas_len, chosen, SamplingSpec()), np.ones(prompt_len, dtype=np.int64))
    steps = []
    for i, move in enumerate(moves):
        rows = denoiser.begin(torch.tensor([1]), [1])
        if left is not None:
            rows, _ = rows.without(~torch.isin(rows.positions, torch.tensor(left[i])))
        slots = rows.predicted_index[1]
        wanted = torch.tensor([int(s) in move for s in slots])
        token = torch.tensor([move.get(int(s), 0) for s in slots])
        entropy = None if entropies is None else torch.full(slots.shape, entropies[i])
        drift = None
        if drifts is not None:
            attended = torch.zeros(1, rows.view.num_positions, dtype=torch.bool)
            attended[0, drifts[i][1]] = True
            drift = Drift(torch.tensor([drifts[i][0]]), attended)
        confidence = wanted.float() if confidences is None else torch.tensor(confidences[i])[slots]
        result = denoiser.finish(
            rows, RowStats(token, confidence, None, entropy), None, () if drift is None else (drift,)
        )
        got = result.committed[0].nonzero().flatten().tolist()
        assert got == sorted(move), f"step {i} cannot commit {sorted(move)}: candidates are {slots.tolist()}"
        candidates = rows.candidates[0].nonzero().flatten().tolist()
        hidden, meter = hook_of(rows, KeysHook), hook_of(rows, DriftHook)
        keys = None if hidden is None else hidden.keys[0]
        steps.append(
            Replayed(
                rows.positions.tolist(),
                candidates,
                None if keys is None else keys.tolist(),
                None if hidden is None else hidden.choices[0],
                hook_of(rows, OutputHook),
                hook_of(rows, RowGate),
                None if meter is None else meter.watched[0],
            )
        )
    return steps


def one_by_one(*slots: int) -> list[dict[int, int]]:
    """Moves that commit one slot a step."""
    return [{slot: 7} for slot in slots]
