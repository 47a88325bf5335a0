"""Slot-indexed record of what running requests ask to be done to their logits (ops/logit_edits.py does it)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vllm_d2cache.canvas.request import EditSpec, Request
from vllm_d2cache.canvas.rows import StepRows
from vllm_d2cache.canvas.states import CanvasStates
from vllm_d2cache.ops.logit_edits import NO_PENALTIES, LogitEdits, RowEdits


class Constraints:
    """Biases, bans, minimum lengths and penalties of running requests; costs nothing while nobody asks.

    Args:
        canvas: of the running requests; read, never written.
    """

    def __init__(self, canvas: CanvasStates) -> None:
        num_slots, device = canvas.prompt_len.shape[0], canvas.device
        self.canvas = canvas
        self._specs: dict[int, EditSpec] = {}
        self._allowed = _IdTable(num_slots, device)
        self._bias_ids = _IdTable(num_slots, device)
        self._bias = torch.zeros(num_slots, 1, device=device)
        self._banned = _IdTable(num_slots, device)
        self._stop_ids = _IdTable(num_slots, device)
        self._min_tokens = torch.zeros(num_slots, dtype=torch.int64, device=device)
        self._penalties = torch.tensor(NO_PENALTIES, device=device).repeat(num_slots, 1)

    def add(self, slot: int, request: Request) -> None:
        """Note what the request of ``slot`` asks, if anything."""
        self._specs.pop(slot, None)
        spec = request.sampling.edits
        # A line is written in any case: it is read whenever a mate uses the table.
        self._allowed.set(slot, spec.allowed)
        self._bias_ids.set(slot, [token for token, _ in spec.bias])
        self._bias = _widened(self._bias, self._bias_ids.ids.shape[1], 0.0)
        self._bias[slot] = 0.0
        self._bias[slot, : len(spec.bias)] = torch.tensor([value for _, value in spec.bias])
        self._banned.set(slot, spec.banned)
        self._stop_ids.set(slot, spec.stop_ids if spec.min_tokens else ())
        self._min_tokens[slot] = spec.min_tokens
        self._penalties[slot] = torch.tensor(spec.penalties)
        # stop_ids are there for min_tokens alone.
        if spec != EditSpec(stop_ids=spec.stop_ids):
            self._specs[slot] = spec

    def remove(self, slot: int) -> None:
        """Forget the request in ``slot``."""
        self._specs.pop(slot, None)

    def any_of(self, slots: Sequence[int]) -> bool:
        """Whether some request of these slots asks for anything."""
        return not self._specs.keys().isdisjoint(slots)

    def of_slots(self, rows: StepRows, who: torch.Tensor, slot: torch.Tensor) -> RowEdits | None:
        """The edits of slots ``slot`` [n] of requests ``who`` [n]; None where none of the step asks for any."""
        specs = [self._specs[slot] for slot in rows.slots if slot in self._specs]
        if not specs:
            return None
        slots = rows.view.slots
        bias, length = any(s.bias for s in specs), any(s.min_tokens for s in specs)
        penalties = any(s.penalties != NO_PENALTIES for s in specs)
        edits = LogitEdits(
            allowed=self._allowed.ids[slots].long() if any(s.allowed for s in specs) else None,
            bias_ids=self._bias_ids.ids[slots].long() if bias else None,
            bias=self._bias[slots] if bias else None,
            stop_ids=self._stop_ids.ids[slots].long() if length else None,
            min_tokens=self._min_tokens[slots] if length else None,
            penalties=self._penalties[slots] if penalties else None,
            text=self._text(rows) if penalties else None,
            prompt_len=rows.view.prompt_len if penalties else None,
            banned=self._banned.ids[slots].long() if any(s.banned for s in specs) else None,
        )
        return RowEdits(edits, who, slot)

    def _text(self, rows: StepRows) -> torch.Tensor:
        """[R, T] int64: the tokens that stand in prompt and canvas, -1 at masks and past a row's end."""
        view = rows.view
        tokens = self.canvas.tokens[view.slots, : view.num_positions].long()
        position = torch.arange(view.num_positions, device=tokens.device).unsqueeze(0)
        slot = position - view.prompt_len.unsqueeze(1)
        masked = view.masked.gather(1, slot.clamp(0, view.masked.shape[1] - 1)) & (slot >= 0)
        return tokens.masked_fill(masked | ~view.in_text, -1)


class _IdTable:
    """A list of token ids for each slot, [slots, widest] int32, padded with -1."""

    def __init__(self, num_slots: int, device: torch.device) -> None:
        self.ids = torch.full((num_slots, 1), -1, dtype=torch.int32, device=device)

    def set(self, slot: int, ids: Sequence[int]) -> None:
        self.ids = _widened(self.ids, len(ids), -1)
        self.ids[slot] = -1
        self.ids[slot, : len(ids)] = torch.tensor(ids, dtype=torch.int32)


def _widened(table: torch.Tensor, width: int, value: float) -> torch.Tensor:
    missing = width - table.shape[1]
    return torch.nn.functional.pad(table, (0, missing), value=value) if missing > 0 else table
