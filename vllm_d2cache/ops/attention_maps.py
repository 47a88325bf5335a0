"""Where the layers of a step leave the attention maps that somebody reads."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from vllm_d2cache.ops.host import Numbers


class MapGroup(NamedTuple):
    """Maps one behind the other whose rows are equally wide: one matrix."""

    requests: list[int]
    start: int  # first element of the first map
    rows: int  # of all maps
    pitch: int  # elements from a row to the next


@dataclass(frozen=True)
class MapPlan:
    """Which requests leave their attention map, and where in a layer's memory; the same for all layers of a step."""

    shapes: list[tuple[int, int] | None]  # [rows, T] of each request; None = leaves none
    starts: list[int]  # first element of each map, -1 where there is none
    pitches: list[int]  # elements from a row to the next; for kernels it is T
    elements: int
    groups: list[MapGroup]  # of small maps
    numbers: Numbers = field(default_factory=Numbers, repr=False, compare=False)  # see PagedLayout

    @classmethod
    def pack(
        cls, shapes: list[tuple[int, int] | None], numbers: Numbers | None = None, most_grouped: int = 0
    ) -> MapPlan:
        """The maps of those shapes side by side.

        Args:
            numbers: of the step; None = its own.
            most_grouped: maps of at most so many elements lie in groups, of texts that are about as long.
        """
        members: dict[int, list[int]] = {}
        small = [shape is not None and shape[0] * shape[1] <= most_grouped for shape in shapes]
        pitches = [0 if shape is None else shape[1] for shape in shapes]
        for r, (shape, grouped) in enumerate(zip(shapes, small, strict=True)):
            if shape is not None and grouped:
                pitches[r] = 1 << (shape[1] - 1).bit_length()
            if shape is not None:
                members.setdefault(pitches[r] if grouped else -1 - r, []).append(r)
        starts, groups, offset = [-1] * len(shapes), [], 0
        for mine in members.values():
            begin = offset
            for r in mine:
                starts[r], offset = offset, offset + (shapes[r] or (0,))[0] * pitches[r]
            if small[mine[0]]:
                pitch = pitches[mine[0]]
                groups.append(MapGroup(mine, begin, (offset - begin) // pitch, pitch))
        numbers = Numbers() if numbers is None else numbers
        if offset:
            numbers.expect(starts, torch.int64)
        return cls(shapes, starts, pitches, offset, groups, numbers)

    def read_on_device(self, starts: torch.Tensor) -> None:
        """Have kernels read ``starts`` [R] int64, which may change; those of the host are then no more than room."""
        self.__dict__["_starts"] = starts

    def starts_on(self, device: torch.device) -> torch.Tensor:
        """[R] int64: ``starts`` on the device."""
        if "_starts" not in self.__dict__:
            self.__dict__["_starts"] = self.numbers.on(device, self.starts, torch.int64)
        return self.__dict__["_starts"]


@dataclass(frozen=True)
class AttentionMaps:
    """Where one layer leaves its maps; indexed by request: float32 [rows, T], or None.

    Attributes:
        memory: flat float32, at least ``plan.elements`` long.
        lse: [N, heads] float32; kernels leave log2 sum_j 2^(s_ij log2 e) of the scaled logits here. None = not kept.
    """

    plan: MapPlan
    memory: torch.Tensor
    lse: torch.Tensor | None = None

    def __getitem__(self, r: int) -> torch.Tensor | None:
        plan, shape = self.plan, self.plan.shapes[r]
        return None if shape is None else self._at(plan.starts[r], shape, plan.pitches[r])

    def of_group(self, group: MapGroup) -> torch.Tensor:
        """[rows, pitch] float32: its maps; columns past a text's end hold anything."""
        return self._at(group.start, (group.rows, group.pitch), group.pitch)

    def _at(self, start: int, shape: tuple[int, int], pitch: int) -> torch.Tensor:
        return self.memory.as_strided(shape, (pitch, 1), self.memory.storage_offset() + start)

    def __len__(self) -> int:
        return len(self.plan.shapes)
