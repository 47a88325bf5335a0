"""Rows that leave the network behind a layer.

Behind some layers a request keeps the rows that matter: a score says which, made of what the policy knew before the
step and of how far each row's hidden state has moved since a step in which the row stayed. How many stay is known on
the host, so that all shapes are; which, on the device alone. Nothing of a row that left is computed in deeper layers,
and it has no logits: the slots that are read from it are not candidates of this step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from vllm_d2cache.canvas.rows import StepRows
from vllm_d2cache.canvas.states import CanvasStates
from vllm_d2cache.canvas.view import CanvasView
from vllm_d2cache.mechanisms.base import KEYS, ROWS, Mechanism, RequestSize, Use, Wish, Worker
from vllm_d2cache.mechanisms.canvas_rows import canvas_rows
from vllm_d2cache.mechanisms.partial_forward import BeforeLayer, RowHook
from vllm_d2cache.mechanisms.row_store import RowStore
from vllm_d2cache.ops.hidden_change import at_most_one, relative_change
from vllm_d2cache.ops.host import upload
from vllm_d2cache.ops.value_change import most_changed


@dataclass(frozen=True)
class DropsRows(Use):
    """Rows leave the network behind at most so many layers; hidden states are remembered there."""

    name: ClassVar[str] = "drops rows"
    needs: ClassVar[frozenset[str]] = frozenset({KEYS, ROWS})
    takes: ClassVar[frozenset[str]] = frozenset({ROWS})
    layers: int

    def make(self, worker: Worker) -> ExitMemory:
        return ExitMemory(worker)

    def request_bytes(self, size: RequestSize) -> int:
        """A hidden state behind each of these layers, for the canvas and the position before it."""
        return self.layers * (size.canvas_len + 1) * size.row_bytes


@dataclass(frozen=True)
class RowExits(Wish):
    """Refreshed rows that leave the network behind some layer: deeper layers keep the K and V they have for them.

    Which rows leave is decided in the forward pass: those with the smallest bias + weight * change, where change is how
    far the hidden state moved since a step in which the row stayed (ops/hidden_change.py).
    """

    use: ClassVar[type[Use]] = DropsRows
    # [R, layers] int64: of the rows from the position before the canvas on, so many stay behind this layer, or all if
    # there are fewer; -1 = the layer lets all pass, and remembers no hidden states.
    keep: torch.Tensor
    bias: torch.Tensor  # [R, T] float32
    weight: torch.Tensor  # [R] float32


class ExitMemory(Mechanism):
    """Hidden states of rows that stayed, and the wishes for the next step: RowExits by slot."""

    keep: torch.Tensor
    bias: torch.Tensor
    weight: torch.Tensor

    def __init__(self, worker: Worker) -> None:
        super().__init__(worker)
        self.states = RowStore()

    def tables(self) -> dict[str, Any]:
        slots, device = self.worker.num_slots, self.worker.device
        return {
            "keep": torch.zeros(slots, self.worker.traits.num_layers, dtype=torch.int64, device=device),
            "bias": torch.zeros(slots, self.worker.max_len, device=device),
            "weight": torch.zeros(slots, device=device),
        }

    def store(self, view: CanvasView, wish: RowExits) -> None:
        self.keep[view.slots] = wish.keep
        self.bias[view.slots, : wish.bias.shape[1]] = wish.bias
        self.weight[view.slots] = wish.weight

    def forget(self, slot: int) -> None:
        self.states.drop(slot)

    def open(self, rows: StepRows, members: dict[int, Use], canvas: CanvasStates) -> RowGate:
        """Waits for the device: how many rows leave."""
        slots, dropping = rows.view.slots, list(members)
        remembered = canvas_rows(rows, dropping)
        keep = dict(zip(dropping, self.keep[slots][dropping].tolist(), strict=True))
        left = {r: len(remembered[r][0]) for r in dropping}
        staying, exits = [rows.counts], []
        for layer in range(self.keep.shape[1]):
            here = {r: min(left[r], keep[r][layer]) for r in dropping if keep[r][layer] >= 0}
            behind = list(staying[-1])
            for r, stay in here.items():
                behind[r] -= left[r] - stay
                left[r] = stay
            staying.append(behind)
            exits.append(here)
        return RowGate(
            staying=staying[1:],
            exits=exits,
            remembered=remembered,
            capacity={r: rows.lengths[r] - rows.prompt_lens[r] + 1 for r in dropping},
            request=rows.request,
            bias=self.bias[slots[rows.request], rows.text_positions],
            weight=self.weight[slots[rows.request]],
            slots=rows.slots,
            memory=self.states,
            still_there=torch.ones_like(rows.request, dtype=torch.bool),
        )


@dataclass
class RowGate(RowHook):
    """Which rows are still in the network, during one forward pass."""

    staying: list[list[int]]  # of each layer: rows of each request behind it
    exits: list[dict[int, int]]  # of each layer: request -> how many of its ``remembered`` rows stay
    remembered: dict[int, tuple[torch.Tensor, torch.Tensor]]  # request -> rows with a memory, and their places
    capacity: dict[int, int]  # request -> places
    request: torch.Tensor  # [N] int64, row of the batch each belongs to
    bias: torch.Tensor  # [N] float32
    weight: torch.Tensor  # [N] float32
    slots: list[int]
    memory: RowStore  # hidden states behind the layers where rows may leave, of rows that stayed; changed
    still_there: torch.Tensor  # [N] bool, rows that have not left

    def present(self) -> torch.Tensor:
        return self.still_there

    def counts(self, number: int, counts: list[int]) -> list[int]:
        return list(map(min, counts, self.staying[number - 1]))

    def narrow(self, at: BeforeLayer, computed: torch.Tensor) -> None:
        computed[: self.still_there.shape[0]] &= self.still_there

    def behind(self, number: int, hidden: torch.Tensor, residual: torch.Tensor) -> None:
        """Let rows leave. Rows that left are not read."""
        exits = self.exits[number]
        if not exits:
            return
        mine = [self.remembered[r] for r in exits]
        index = torch.cat([rows for rows, _ in mine])
        state = hidden[index] + residual[index]
        stores = [self._store(r, number, state) for r in exits]
        old = torch.cat([store[place] for store, (_, place) in zip(stores, mine, strict=True)])

        present, request = self.still_there[index], self.request[index]
        # A request's largest change is that of the rows that are still there.
        change = relative_change(state, old).masked_fill(~present, 0)
        change = at_most_one(change, request, len(self.slots))
        score = (self.bias[index] + self.weight[index] * change).masked_fill(~present, -torch.inf)
        count = [exits.get(r, 0) for r in range(len(self.slots))]
        stays = most_changed(score, request, upload(count, torch.int64, index.device))
        self.still_there[index] = stays

        sizes = [len(place) for _, place in mine]
        parts = zip(stores, mine, state.split(sizes), stays.split(sizes), strict=True)
        for store, (_, place), now, stay in parts:
            store[place] = torch.where(stay.unsqueeze(1), now, store[place])

    def _store(self, r: int, layer: int, like: torch.Tensor) -> torch.Tensor:
        """[places, d] of a request behind this layer."""
        layers = [number for number, exits in enumerate(self.exits) if r in exits]
        store = self.memory.of(self.slots[r], len(layers), self.capacity[r], like)
        return store[layers.index(layer)]
