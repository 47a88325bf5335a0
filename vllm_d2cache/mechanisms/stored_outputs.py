"""Layers keep what they add to the stream, and compute the rows whose values have changed most.

A layer's output of a row is what attention and MLP together add to the residual stream. The first layer computes every
row of the step; a later one the rows that are not marked, and of the marked ones those whose values changed most. All
other marked rows add what the layer has stored for them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from vllm_d2cache.canvas.rows import StepRows
from vllm_d2cache.canvas.states import CanvasStates
from vllm_d2cache.canvas.view import CanvasView
from vllm_d2cache.mechanisms.base import ROWS, Mechanism, Members, RequestSize, Use, Wish, Worker
from vllm_d2cache.mechanisms.canvas_rows import canvas_places, canvas_rows, per_request
from vllm_d2cache.mechanisms.partial_forward import BeforeLayer, RowHook
from vllm_d2cache.mechanisms.row_store import RowStore
from vllm_d2cache.mechanisms.value_directions import ValueDirections, leading
from vllm_d2cache.ops.rollout import TensorParallel
from vllm_d2cache.ops.value_change import change_parts, cosine_distance, most_changed, swap_values, write_keys


@dataclass(frozen=True)
class StoresOutputs(Use):
    """Layers keep outputs for the canvas.

    Attributes:
        proxies: rows are compared by leading components of their values.
    """

    name: ClassVar[str] = "stores outputs"
    takes: ClassVar[frozenset[str]] = frozenset({ROWS})
    proxies: bool = False

    def make(self, worker: Worker) -> OutputStore:
        return OutputStore(worker)

    def request_bytes(self, size: RequestSize) -> int:
        """An output of each layer but the first, for the canvas and the position before it."""
        return (size.layers - 1) * (size.canvas_len + 1) * size.row_bytes


@dataclass(frozen=True)
class StoredOutputs(Wish):
    """Refreshed rows that layers behind the first one need not compute, as they have stored an output for them."""

    use: ClassVar[type[Use]] = StoresOutputs
    rows: torch.Tensor  # [R, T] bool, positions from the one before the canvas on
    compared: torch.Tensor  # [R, T] bool, of these: their values are recomputed in every layer, and
    # [R, layers - 1] int64: so many of them, whose values changed most, are computed after all by each layer.
    count: torch.Tensor
    # [R] int64, of uses with ``proxies``: compared are the components of the values along so many leading directions of
    # their projection, and K is renewed with V; 0 = the values, and V alone. None = 0 for all.
    proxy_rank: torch.Tensor | None = None


class OutputStore(Mechanism):
    """Outputs of layers, and the wishes for the next step: StoredOutputs by slot."""

    kind: torch.Tensor  # by position: 1 where layers may take their stored outputs, 2 where values are compared as well
    count: torch.Tensor
    proxy_rank: torch.Tensor

    def __init__(self, worker: Worker) -> None:
        super().__init__(worker)
        self.outputs = RowStore()
        # Of the model, not of requests: found once.
        self.directions = ValueDirections(worker.tensor_parallel)

    def tables(self) -> dict[str, Any]:
        worker = self.worker
        slots, device = worker.num_slots, worker.device
        return {
            "kind": torch.zeros(slots, worker.max_len, dtype=torch.int8, device=device),
            "count": torch.zeros(slots, worker.traits.num_layers - 1, dtype=torch.int64, device=device),
            "proxy_rank": torch.zeros(slots, dtype=torch.int64, device=device),
        }

    def store(self, view: CanvasView, wish: StoredOutputs) -> None:
        kind = wish.rows.to(torch.int8) + wish.compared.to(torch.int8)
        self.kind[view.slots, : kind.shape[1]] = kind
        self.count[view.slots] = wish.count
        self.proxy_rank[view.slots] = 0 if wish.proxy_rank is None else wish.proxy_rank

    def forget(self, slot: int) -> None:
        self.outputs.drop(slot)

    def open(self, rows: StepRows, members: Members, canvas: CanvasStates) -> OutputHook:
        """Waits for the device once: how many rows each layer computes."""
        view, device = rows.view, self.worker.device
        kind = self.kind[view.slots[rows.request], rows.text_positions]
        if (mine := members.flags(len(rows.slots), device)) is not None:
            kind = kind * mine[rows.request]
        count, place = self.count[view.slots], canvas_places(rows)
        compared = per_request(rows, kind == 2).unsqueeze(1)
        computed = per_request(rows, kind == 0).unsqueeze(1) + torch.minimum(compared, count)
        rank = self.proxy_rank[view.slots[rows.request]]
        ranked = ((kind == 2) & (rank != 0)).sum().view(1)
        *numbers, num_ranked = torch.cat([computed.t().flatten(), compared.flatten(), place[1], ranked]).tolist()
        n = len(rows.slots)
        *per_layer, num_compared, sizes = (numbers[i : i + n] for i in range(0, len(numbers), n))
        index = (kind == 2).nonzero_static(size=sum(num_compared)).flatten()
        proxied = None
        if any(isinstance(use, StoresOutputs) and use.proxies for use in members.values()):
            rank = rank[index]
            some = rank.nonzero_static(size=num_ranked).flatten()
            proxied = (some, rank[some])
        return OutputHook(
            stored=kind > 0,
            compared=index,
            request=rows.request,
            count=count,
            computed=per_layer,
            proxied=proxied,
            kept=canvas_rows(rows, place[0], sizes, members),
            capacity={r: rows.lengths[r] - rows.prompt_lens[r] + 1 for r in members},
            slots=rows.slots,
            outputs=self.outputs,
            directions=self.directions,
            tensor_parallel=self.worker.tensor_parallel,
        )


@dataclass
class OutputHook(RowHook):
    """The stored outputs of one forward pass."""

    keeps_outputs = True
    stored: torch.Tensor  # [N] bool
    compared: torch.Tensor  # [m] int64 ascending rows
    request: torch.Tensor  # [N] int64, row of the batch each belongs to
    count: torch.Tensor  # [R, layers - 1] int64
    computed: list[list[int]]  # of each layer behind the first one: rows of each request that it computes
    # Of the compared rows, those compared by proxies: [m] int64 into ``compared``, and the rank of each.
    proxied: tuple[torch.Tensor, torch.Tensor] | None
    kept: dict[int, tuple[torch.Tensor, torch.Tensor]]  # request -> its rows whose outputs are kept, and their places
    capacity: dict[int, int]  # request -> places
    slots: list[int]
    outputs: RowStore
    directions: ValueDirections
    tensor_parallel: TensorParallel | None = None

    def counts(self, number: int, counts: list[int]) -> list[int]:
        return list(map(min, counts, self.computed[number - 1]))

    def narrow(self, at: BeforeLayer, computed: torch.Tensor) -> None:
        """Writes the values of the compared rows."""
        computed[: self.stored.shape[0]] &= ~self.stored
        if len(self.compared):
            distance = self._distance(at)
            computed[self.compared] = most_changed(distance, self.request[self.compared], self.count[:, at.number - 1])

    def stand_in(self, at: BeforeLayer, computed: torch.Tensor, outputs: torch.Tensor, hidden: torch.Tensor) -> None:
        for r, (mine, place) in self.kept.items():
            stored = self.outputs.of(self.slots[r], at.num_layers - 1, self.capacity[r], hidden)[at.number - 1]
            stored[place] = torch.where(computed[mine].unsqueeze(1), outputs[mine], stored[place])
            hidden[mine] = stored[place]

    def _distance(self, at: BeforeLayer) -> torch.Tensor:
        """[n] float32, of the values of the compared rows from those in their pages, which they replace."""
        index = self.compared
        slots, hidden, residual = at.slots[index], at.hidden[index], at.residual[index]
        if self.proxied is None:
            value = at.layer.values(hidden, residual)
        else:
            key, value = at.layer.keys_and_values(at.positions[index], hidden, residual)
            write_keys(at.layer.pages, key[self.proxied[0]], slots[self.proxied[0]])
        old = swap_values(at.layer.pages, value, slots)
        distance = cosine_distance(self._all_reduce(change_parts(value, old)))
        if self.proxied is not None:
            some, rank = self.proxied
            pair = self.directions.components(at.number, at.layer, torch.stack([value[some], old[some]]))
            distance[some] = cosine_distance(change_parts(*leading(self._all_reduce(pair), rank)))
        return distance

    def _all_reduce(self, own_heads: torch.Tensor) -> torch.Tensor:
        """The sum over all heads; ranks hold different ones."""
        return own_heads if self.tensor_parallel is None else self.tensor_parallel.all_reduce(own_heads)
