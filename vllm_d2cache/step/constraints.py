"""Slot-indexed record of what running requests ask to be done to their logits (ops/logit_edits.py does it)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vllm_d2cache.canvas.request import Request
from vllm_d2cache.canvas.rows import StepRows
from vllm_d2cache.canvas.states import CanvasStates
from vllm_d2cache.ops.host import Writes
from vllm_d2cache.ops.logit_edits import NO_PENALTIES, LogitEdits, RowEdits
from vllm_d2cache.options.sampling import EditSpec


class Constraints:
    """Biases, bans, minimum lengths and penalties of running requests; costs nothing while nobody asks.

    Args:
        canvas: of the running requests; read, never written.
    """

    def __init__(self, canvas: CanvasStates) -> None:
        num_slots, device = canvas.prompt_len.shape[0], canvas.device
        self.canvas = canvas
        self._specs: dict[int, EditSpec] = {}
        self._written: set[int] = set()  # slots whose lines are not those of a request that asks for nothing
        self._allowed = _IdTable(num_slots, device)
        self._bias_ids = _IdTable(num_slots, device)
        self._bias = torch.zeros(num_slots, 1, device=device)
        self._banned = _IdTable(num_slots, device)
        self._stop_ids = _IdTable(num_slots, device)
        self._min_tokens = torch.zeros(num_slots, dtype=torch.int64, device=device)
        self._penalties = torch.tensor(NO_PENALTIES).repeat(num_slots, 1).to(device)

    def add(self, slot: int, request: Request, writes: Writes) -> None:
        """Note what the request of ``slot`` asks, if anything.

        Args:
            writes: what it needs of the host is put here; nothing may read the slot before they are sent.
        """
        self._specs.pop(slot, None)
        spec = request.sampling.edits
        # stop_ids are there for min_tokens alone.
        asks = spec != EditSpec(stop_ids=spec.stop_ids)
        if not asks and slot not in self._written:
            return
        # Of who asks for anything every line is written: it is read whenever a mate uses the table.
        self._allowed.put(slot, spec.allowed, writes)
        self._bias_ids.put(slot, [token for token, _ in spec.bias], writes)
        self._bias = _widened(self._bias, self._bias_ids.ids.shape[1], 0.0)
        values = [value for _, value in spec.bias]
        writes.put(self._bias[slot], values + [0.0] * (self._bias.shape[1] - len(values)))
        self._banned.put(slot, spec.banned, writes)
        self._stop_ids.put(slot, spec.stop_ids if spec.min_tokens else (), writes)
        self._min_tokens[slot] = spec.min_tokens
        writes.put(self._penalties[slot], spec.penalties)
        if asks:
            self._specs[slot] = spec
            self._written.add(slot)
        else:
            self._written.discard(slot)

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

    def put(self, slot: int, ids: Sequence[int], writes: Writes) -> None:
        self.ids = _widened(self.ids, len(ids), -1)
        writes.put(self.ids[slot], [*ids, *[-1] * (self.ids.shape[1] - len(ids))])


def _widened(table: torch.Tensor, width: int, value: float) -> torch.Tensor:
    missing = width - table.shape[1]
    return torch.nn.functional.pad(table, (0, missing), value=value) if missing > 0 else table
