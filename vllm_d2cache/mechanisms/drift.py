"""How much the attention to each layer's most attended token has changed since the request's last step.

Measured while the layers run: the rows of the slots that may be committed are the ones that look. Works from queries
and keys, so that no attention map is kept.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

import torch

from vllm_d2cache.canvas.rows import StepRows
from vllm_d2cache.canvas.states import CanvasStates
from vllm_d2cache.canvas.view import canvas_to_positions
from vllm_d2cache.mechanisms.base import KEYS, ROWS, Finding, Hook, Mechanism, Members, Use, Worker
from vllm_d2cache.mechanisms.canvas_rows import per_request
from vllm_d2cache.ops.attention_drift import attention_to, received_attention, shared_similarity
from vllm_d2cache.ops.paged_attention import PagedLayout, read_kv
from vllm_d2cache.ops.rollout import TensorParallel


@dataclass(frozen=True)
class ReadsDrift(Use):
    """Drift is measured in every step."""

    name: ClassVar[str] = "reads drift"
    needs: ClassVar[frozenset[str]] = frozenset({KEYS, ROWS})

    def make(self, worker: Worker) -> DriftMeter:
        return DriftMeter(worker)


@dataclass(frozen=True)
class Drift(Finding):
    """How the attention of the rows that may be committed has changed since the last step."""

    # [R] float32, cosine similarity in the layer that changed most; 0 where nothing can be compared
    similarity: torch.Tensor
    attended: torch.Tensor  # [R, T] bool, of each layer the known position that received most


class WatchedRows(NamedTuple):
    """The rows of one request whose attention is measured: those of the slots that may be committed."""

    rows: torch.Tensor  # [n] int64, as indices into the request's rows
    positions: torch.Tensor  # [n] int64 ascending
    known: torch.Tensor  # [T] bool, positions that hold no mask


class Focus(NamedTuple):
    """What a step leaves for the next one to compare with."""

    attended: torch.Tensor  # [layers] int64, the position each layer attends to most
    received: torch.Tensor  # [layers, T] float32, what it received of the row at each position; 0 where none looked
    watched: torch.Tensor  # [T] bool, the positions that looked


class DriftMeter(Mechanism):
    """What each slot's last step attended to."""

    def __init__(self, worker: Worker) -> None:
        super().__init__(worker)
        self.memory: dict[int, Focus] = {}

    def forget(self, slot: int) -> None:
        self.memory.pop(slot, None)

    def open(self, rows: StepRows, members: Members, canvas: CanvasStates) -> DriftHook:
        """Waits for the device once: how many rows look."""
        view = rows.view
        watched: list[WatchedRows | None] = [None] * len(rows.slots)
        known = ~canvas_to_positions(view.masked, view)
        looking = canvas_to_positions(rows.candidates, view)[rows.request, rows.text_positions]
        if (mine := members.flags(len(rows.slots), view.slots.device)) is not None:
            looking = looking & mine[rows.request]
        counts = per_request(rows, looking).tolist()
        index = looking.nonzero_static(size=sum(counts)).flatten()
        first = rows.refreshed.cumsum(0) - rows.refreshed
        within = (index - first[rows.request[index]]).split(counts)
        positions = rows.text_positions[index].split(counts)
        for r in members:
            watched[r] = WatchedRows(within[r], positions[r], known[r, : rows.lengths[r]])
        return DriftHook(watched, rows.slots, self.memory, self.worker.tensor_parallel)


class _LayerFocus(NamedTuple):
    attended: torch.Tensor  # [] int64
    now: torch.Tensor  # [n] float32, of each looking row, what that position receives
    before: torch.Tensor  # [n] float32, what the one of the last step receives


@dataclass
class DriftHook(Hook):
    """Filled layer by layer during one forward pass.

    Attributes:
        watched: the looking rows of each request, None where its policy does not want to know.
        slots: of the requests.
        memory: what the last steps left; ``result`` changes it.
    """

    watched: list[WatchedRows | None]
    slots: list[int]
    memory: dict[int, Focus]
    tensor_parallel: TensorParallel | None = None
    layers: list[dict[int, _LayerFocus]] = field(default_factory=list)

    def before_attention(
        self, query: torch.Tensor, kv_cache: torch.Tensor, scale: float, layout: PagedLayout
    ) -> PagedLayout:
        """Take the layer's measurements."""
        found, offset = {}, 0
        for r, watched in enumerate(self.watched):
            rows = query[offset : offset + layout.counts[r]]
            offset += layout.counts[r]
            if watched is not None:
                key, _ = read_kv(kv_cache, layout, r)
                found[r] = self._layer(self.slots[r], watched, rows[watched.rows], key, scale)
        self.layers.append(found)
        return layout

    def _layer(
        self, slot: int, watched: WatchedRows, query: torch.Tensor, key: torch.Tensor, scale: float
    ) -> _LayerFocus:
        total, normaliser = received_attention(query, key, scale)
        attended = self._mean(total).masked_fill(~watched.known, -torch.inf).argmax()
        last = self.memory.get(slot)
        before = attended if last is None else last.attended[len(self.layers)]
        columns = [attention_to(query, key, scale, normaliser, p) for p in (attended, before)]
        now, old = self._mean(torch.stack(columns)).unbind(0)
        return _LayerFocus(attended, now, old)

    def _mean(self, own_heads: torch.Tensor) -> torch.Tensor:
        """The mean over all heads; ranks hold different ones and have to agree."""
        if self.tensor_parallel is None:
            return own_heads
        return self.tensor_parallel.all_reduce(own_heads) / self.tensor_parallel.size

    def result(self, num_positions: int) -> Drift:
        """Compare with the last step, and remember this one for the next."""
        device = next(w.known.device for w in self.watched if w is not None)
        similarity = torch.zeros(len(self.watched), device=device)
        attended = torch.zeros(len(self.watched), num_positions, dtype=torch.bool, device=device)
        for r, watched in enumerate(self.watched):
            if watched is None:
                continue
            layers = [layer[r] for layer in self.layers]
            place = torch.zeros_like(watched.known)
            place[watched.positions] = True
            now, before = torch.zeros(2, len(layers), len(place), device=device).unbind(0)
            now[:, watched.positions] = torch.stack([layer.now for layer in layers])
            before[:, watched.positions] = torch.stack([layer.before for layer in layers])
            last = self.memory.get(self.slots[r])
            if last is not None:
                similarity[r] = shared_similarity(before, last.received, place & last.watched)
            focus = torch.stack([layer.attended for layer in layers])
            attended[r, focus] = True
            self.memory[self.slots[r]] = Focus(focus, now, place)
        return Drift(similarity, attended)
