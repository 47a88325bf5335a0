"""Keys that rows do not see: the same for all layers, or another set in each, chosen once in a while."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import torch

from vllm_d2cache.canvas.rows import StepRows
from vllm_d2cache.canvas.states import CanvasStates
from vllm_d2cache.canvas.view import CanvasView
from vllm_d2cache.mechanisms.base import KEYS, Hook, Mechanism, Members, Use, Wish, Worker
from vllm_d2cache.mechanisms.canvas_rows import per_request
from vllm_d2cache.ops.key_choice import choose_keys, mean_query_scores
from vllm_d2cache.ops.paged_attention import PagedLayout, read_kv
from vllm_d2cache.ops.rollout import TensorParallel


class KeptKeys(NamedTuple):
    """Keys beyond the visible ones, another set in each layer; each [R]. A request may choose them once in a while."""

    choose: torch.Tensor  # bool, the step attends to everything, and each layer chooses of what is not visible
    apply: torch.Tensor  # bool, the step attends to the visible positions and to those its layer has chosen
    number: torch.Tensor  # int64, how many a layer chooses: by their scores under the window's mean query
    pool: torch.Tensor  # int64, width of the neighbourhood whose best score counts (ops/key_choice.py)


@dataclass(frozen=True)
class HidesKeys(Use):
    """Plans say which positions are visible."""

    name: ClassVar[str] = "hides keys"
    takes: ClassVar[frozenset[str]] = frozenset({KEYS})

    def make(self, worker: Worker) -> HiddenKeys:
        return HiddenKeys(worker)


@dataclass(frozen=True)
class VisibleKeys(Wish):
    """[R, T] bool, keys that the rows attend to: each must have been refreshed in this step or an earlier one."""

    use: ClassVar[type[Use]] = HidesKeys
    visible: torch.Tensor
    kept: KeptKeys | None = None


@dataclass(frozen=True)
class KeyChoice:
    """KeptKeys of one request, as the layers need it."""

    choose: bool  # else apply
    visible: torch.Tensor  # [n] int64, ascending positions that every layer sees
    queries: torch.Tensor  # [b] int64, the window's rows, as indices into the request's rows
    count: int
    pool: int


class HiddenKeys(Mechanism):
    """What each slot sees, and what its layers have chosen."""

    visible: torch.Tensor  # [slots, max len] bool
    kept: torch.Tensor  # [slots, 4] int64, as KeptKeys

    def __init__(self, worker: Worker) -> None:
        super().__init__(worker)
        self.chosen: dict[int, list[torch.Tensor]] = {}  # slot -> of each layer, [n] int64 ascending

    def tables(self) -> dict[str, Any]:
        slots, device = self.worker.num_slots, self.worker.device
        return {
            "visible": torch.zeros(slots, self.worker.max_len, dtype=torch.bool, device=device),
            "kept": torch.zeros(slots, len(KeptKeys._fields), dtype=torch.int64, device=device),
        }

    def store(self, view: CanvasView, wish: VisibleKeys) -> None:
        self.visible[view.slots, : wish.visible.shape[1]] = wish.visible
        self.kept[view.slots] = 0 if wish.kept is None else torch.stack([x.long() for x in wish.kept], 1)

    def forget(self, slot: int) -> None:
        self.chosen.pop(slot, None)

    def open(self, rows: StepRows, members: Members, canvas: CanvasStates) -> KeysHook:
        """Waits for the device once: how many keys there are, and how many rows say which of them are kept."""
        view = rows.view
        nobody: list[None] = [None] * len(rows.slots)
        hook = KeysHook([*nobody], [*nobody], rows.slots, self.chosen, self.worker.tensor_parallel)
        visible = self.visible[view.slots, : view.num_positions] & view.in_text
        kept = self.kept[view.slots]
        asks = kept[:, :2].any(1)
        if (mine := members.flags(len(rows.slots), view.slots.device)) is not None:
            visible, asks = visible & mine.unsqueeze(1), asks & mine
        slot = rows.text_positions - view.prompt_len[rows.request]
        inside = (slot >= 0) & view.in_window[rows.request, slot.clamp(min=0)] & asks[rows.request]
        found = torch.stack([visible.sum(1), per_request(rows, inside)], 1)
        numbers = torch.cat([kept, found], 1).tolist()
        positions = visible.nonzero_static(size=sum(line[4] for line in numbers))[:, 1]
        index = inside.nonzero_static(size=sum(line[5] for line in numbers)).flatten()
        first = rows.refreshed.cumsum(0) - rows.refreshed
        queries = (index - first[rows.request[index]]).split([line[5] for line in numbers])
        for r, keys in enumerate(positions.split([line[4] for line in numbers])):
            choose, apply, count, pool, seen, _ = numbers[r]
            if r not in members:
                continue
            if choose or apply:
                hook.choices[r] = KeyChoice(bool(choose), keys, queries[r], count, pool)
            elif seen < rows.lengths[r]:
                hook.keys[r] = keys
        return hook


@dataclass
class KeysHook(Hook):
    """Gives each layer of one forward pass its keys.

    Attributes:
        keys: [n] int64 ascending positions of each request, the same for all layers; None = all.
        choices: of each request whose keys differ from layer to layer.
        slots: of the requests.
        chosen: what earlier steps left; changed in steps that choose.
    """

    keys: list[torch.Tensor | None]
    choices: list[KeyChoice | None]
    slots: list[int]
    chosen: dict[int, list[torch.Tensor]]
    tensor_parallel: TensorParallel | None = None
    layer: int = 0
    _seen: tuple[PagedLayout, PagedLayout] | None = None  # a layout of all keys, and the same with the visible ones

    def before_attention(
        self, query: torch.Tensor, kv_cache: torch.Tensor, scale: float, layout: PagedLayout
    ) -> PagedLayout:
        """A request that chooses attends to everything and leaves its choice behind."""
        if not any(self.choices):
            # One layout for all layers: kernels read its keys once a step.
            if self._seen is None or self._seen[0] is not layout:
                self._seen = layout, replace(layout, keys=self.keys)
            return self._seen[1]
        keys = list(self.keys)
        offset = 0
        for r, choice in enumerate(self.choices):
            rows = query[offset : offset + layout.counts[r]]
            offset += layout.counts[r]
            if choice is None:
                continue
            if choice.choose:
                self._choose(r, choice, rows[choice.queries], kv_cache, layout)
            else:
                keys[r] = torch.cat([choice.visible, self.chosen[self.slots[r]][self.layer]]).sort().values
        self.layer += 1
        return replace(layout, keys=keys)

    def keys_attended(self, r: int) -> int | None:
        choice, keys = self.choices[r], self.keys[r]
        if choice is not None and not choice.choose:
            return choice.visible.shape[0] + choice.count
        return None if keys is None else keys.shape[0]

    def _choose(
        self, r: int, choice: KeyChoice, query: torch.Tensor, kv_cache: torch.Tensor, layout: PagedLayout
    ) -> None:
        scores = mean_query_scores(query, read_kv(kv_cache, layout, r)[0])
        if self.tensor_parallel is not None:
            # Ranks hold different heads; all have to keep the same keys.
            scores = self.tensor_parallel.all_reduce(scores) / self.tensor_parallel.size
        outside = torch.ones_like(scores, dtype=torch.bool)
        outside[choice.visible] = False
        places = outside.nonzero_static(size=len(scores) - len(choice.visible)).flatten()
        if self.layer == 0:
            self.chosen[self.slots[r]] = []
        self.chosen[self.slots[r]].append(places[choose_keys(scores[places], choice.count, choice.pool)])
