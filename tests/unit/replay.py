"""Requests through the real StepRunner with every commit decided beforehand: shows what a policy makes of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import torch

from tests.unit.batches import Told, hook_of
from vllm_d2cache.canvas.request import Request
from vllm_d2cache.canvas.traits import FamilyTraits
from vllm_d2cache.mechanisms.base import Hook, Worker
from vllm_d2cache.mechanisms.drift import Drift, DriftHook, WatchedRows
from vllm_d2cache.mechanisms.hidden_keys import KeyChoice, KeysHook
from vllm_d2cache.mechanisms.row_exits import ExitHook
from vllm_d2cache.mechanisms.stored_outputs import OutputHook
from vllm_d2cache.ops.row_stats import RowStats
from vllm_d2cache.options.sampling import SamplingSpec
from vllm_d2cache.options.server import ServerOptions
from vllm_d2cache.requests.resolve import resolve
from vllm_d2cache.step.runner import StepRunner
from vllm_d2cache.step.step import Step

MASK = 370


@dataclass(frozen=True)
class Replayed:
    """What the network was asked for in one step; lists are ascending."""

    refreshed: list[int]  # positions
    candidates: list[int]  # slots that could be committed
    keys: list[int] | None  # positions the rows attend to; None = all
    choice: KeyChoice | None
    stored: OutputHook | None
    exiting: ExitHook | None
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
    chosen = resolve(ServerOptions({}), {"sigma": 0.0, "threshold": 0.5, **options})
    traits = FamilyTraits(MASK, shift, num_layers=num_layers)
    runner = StepRunner(Worker(3, prompt_len + canvas_len + 2, torch.device("cpu"), traits))
    runner.add(1, Request("r", prompt_len, canvas_len, chosen, SamplingSpec()), np.ones(prompt_len, dtype=np.int64))
    steps = []
    for i, move in enumerate(moves):
        step = runner.open(torch.tensor([1]), [1])
        rows = step.rows
        if left is not None:
            rows, _ = rows.without(~torch.isin(rows.positions, torch.tensor(left[i])))
        slots = rows.predicted_index[1]
        wanted = torch.tensor([int(s) in move for s in slots])
        token = torch.tensor([move.get(int(s), 0) for s in slots])
        entropy = None if entropies is None else torch.full(slots.shape, entropies[i])
        told: list[Hook] = []
        if drifts is not None:
            attended = torch.zeros(1, rows.view.num_positions, dtype=torch.bool)
            attended[0, drifts[i][1]] = True
            told.append(Told(Drift(torch.tensor([drifts[i][0]]), attended)))
        confidence = wanted.float() if confidences is None else torch.tensor(confidences[i])[slots]
        stats = RowStats(token, confidence, None, entropy)
        with mock.patch.object(runner.decoding, "row_stats", lambda *args, stats=stats: stats):
            result = runner.close(Step(rows, tuple(told)), torch.zeros(len(rows.logits_rows), 1), torch.clone).result
        got = result.committed[0].nonzero().flatten().tolist()
        assert got == sorted(move), f"step {i} cannot commit {sorted(move)}: candidates are {slots.tolist()}"
        hidden, meter = hook_of(step, KeysHook), hook_of(step, DriftHook)
        keys = None if hidden is None else hidden.keys[0]
        steps.append(
            Replayed(
                rows.positions.tolist(),
                rows.candidates[0].nonzero().flatten().tolist(),
                None if keys is None else keys.tolist(),
                None if hidden is None else hidden.choices[0],
                hook_of(step, OutputHook),
                hook_of(step, ExitHook),
                None if meter is None else meter.watched[0],
            )
        )
    return steps


def one_by_one(*slots: int) -> list[dict[int, int]]:
    """Moves that commit one slot a step."""
    return [{slot: 7} for slot in slots]
