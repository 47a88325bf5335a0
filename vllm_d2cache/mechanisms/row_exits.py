"""Rows that leave the network behind a layer.

Behind some layers a request keeps the rows that matter: a score says which, made of what the policy knew before the
step and of how far each row's hidden state has moved since a step in which the row stayed. How many stay is known on
the host, so that all shapes are; which, on the device alone. Nothing of a row that left is computed in deeper layers,
and it has no logits: the slots that are read from it are not candidates of this step.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from vllm_d2cache.canvas.rows import StepRows
from vllm_d2cache.canvas.states import CanvasStates
from vllm_d2cache.canvas.view import CanvasView
from vllm_d2cache.mechanisms.base import KEYS, ROWS, Mechanism, Members, RequestSize, Use, Wish, Worker
from vllm_d2cache.mechanisms.canvas_rows import canvas_places, canvas_rows
from vllm_d2cache.mechanisms.partial_forward import BeforeLayer, RowHook
from vllm_d2cache.mechanisms.row_store import RowStore
from vllm_d2cache.ops.hidden_change import at_most_one, relative_change
from vllm_d2cache.ops.host import Numbers
from vllm_d2cache.ops.paged_attention import PagedLayout
from vllm_d2cache.ops.value_change import most_changed


@dataclass(frozen=True)
class LetsRowsExit(Use):
    """Rows leave the network behind at most so many layers; hidden states are remembered there."""

    name: ClassVar[str] = "row exits"
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

    use: ClassVar[type[Use]] = LetsRowsExit
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

    def open(self, rows: StepRows, members: Members, canvas: CanvasStates) -> ExitHook:
        """Waits for the device once: how many rows leave."""
        slots, dropping = rows.view.slots, list(members)
        place, sizes = canvas_places(rows)
        known = torch.cat([torch.stack([sizes, rows.num_predicted], 1), self.keep[slots]], 1).tolist()
        left, predicted = ([line[i] for line in known] for i in range(2))
        keep = {r: known[r][2:] for r in dropping}
        remembered = canvas_rows(rows, place, left, dropping)
        staying, exits = [rows.counts], []
        for layer in range(self.keep.shape[1]):
            here = {r: min(left[r], keep[r][layer]) for r in dropping if keep[r][layer] >= 0}
            behind = list(staying[-1])
            for r, stay in here.items():
                behind[r] -= left[r] - stay
                left[r] = stay
            staying.append(behind)
            exits.append(here)
        return ExitHook(
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
            predicted=sum(map(min, predicted, staying[-1])),
        )


@dataclass
class ExitHook(RowHook):
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
    predicted: int | None = None  # most rows that have logits at the end
    numbers: Numbers = field(default_factory=Numbers)

    def place(self, layout: PagedLayout) -> None:
        self.numbers = layout.numbers
        for exits in self.exits:
            if exits:
                self.numbers.expect(self._stay(exits), torch.int64)

    def present(self) -> torch.Tensor:
        return self.still_there

    def most_predicted(self) -> int | None:
        return self.predicted

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
        stays = most_changed(score, request, self.numbers.on(index.device, self._stay(exits), torch.int64))
        self.still_there[index] = stays

        sizes = [len(place) for _, place in mine]
        parts = zip(stores, mine, state.split(sizes), stays.split(sizes), strict=True)
        for store, (_, place), now, stay in parts:
            store[place] = torch.where(stay.unsqueeze(1), now, store[place])

    def _stay(self, exits: dict[int, int]) -> list[int]:
        return [exits.get(r, 0) for r in range(len(self.slots))]

    def _store(self, r: int, layer: int, like: torch.Tensor) -> torch.Tensor:
        """[places, d] of a request behind this layer."""
        layers = [number for number, exits in enumerate(self.exits) if r in exits]
        store = self.memory.of(self.slots[r], len(layers), self.capacity[r], like)
        return store[layers.index(layer)]
