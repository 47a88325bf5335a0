"""The seam between a step and what a policy needs of the layers beyond fresh K and V.

A policy *uses* mechanisms (:class:`Use`), and asks for a step's share of each in its plan (:class:`Wish`). A mechanism
keeps wishes and memories by slot. In a step it opens a :class:`Hook`, which the layers call, and which may find
something out for the policy (:class:`Finding`). The step itself knows nothing of any mechanism but this file.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from vllm_d2cache.canvas.view import CanvasView, FamilyTraits
from vllm_d2cache.ops.paged_attention import PagedLayout
from vllm_d2cache.ops.rollout import TensorParallel

if TYPE_CHECKING:
    from vllm_d2cache.canvas.view import StepRows

KEYS, ROWS = "keys", "rows"  # every layer's rows see all keys; every layer computes all rows


@dataclass(frozen=True)
class Worker:
    """What everything with a line for each slot is made from."""

    num_slots: int  # requests that can run at a time
    max_len: int  # most positions a request can have
    device: torch.device
    traits: FamilyTraits
    refresh_budget: int | None = None
    tensor_parallel: TensorParallel | None = None


@dataclass(frozen=True)
class Use(ABC):
    """That a policy uses a mechanism, and how: what is known before anything is allocated."""

    name: ClassVar[str]
    needs: ClassVar[frozenset[str]] = frozenset()
    takes: ClassVar[frozenset[str]] = frozenset()
    """What it needs of all layers, and what it takes from them: others of the same policy cannot need that."""

    @abstractmethod
    def make(self, worker: Worker) -> Mechanism:
        """The mechanism; one serves all policies."""

    def request_bytes(self, layers: int, row_bytes: int, canvas_len: int) -> int:
        """What a running request holds."""
        return 0


@dataclass(frozen=True)
class Wish:
    """What a policy asks of a mechanism for the next step; tensors have a line for each row of the plan."""

    use: ClassVar[type[Use]]


class Finding(ABC):
    """What a hook has found out; tensors have a line for each row of the step."""

    @abstractmethod
    def select(self, rows: torch.Tensor) -> Finding:
        """That of some rows only."""


class Mechanism(ABC):
    """State of one mechanism for all requests whose policy uses it."""

    @abstractmethod
    def store(self, view: CanvasView, wish: Any) -> None:
        """Keep the wish until the next step."""

    @abstractmethod
    def open(self, rows: StepRows, members: dict[int, Use], lengths: Sequence[int]) -> Hook:
        """Its part of a step.

        Args:
            members: rows of the batch whose policies use it, and how.
            lengths: T of each row of the batch.
        """

    def forget(self, slot: int) -> None:  # noqa: B027
        """The request in ``slot`` has ended, or starts over."""


class Hook:
    """A mechanism's part of one forward pass. Every method does nothing unless it is overridden."""

    chooses_rows: ClassVar[bool] = False
    """Whether layers differ in their rows: PartialForward then runs them."""

    def before_attention(
        self, query: torch.Tensor, kv_cache: torch.Tensor, scale: float, layout: PagedLayout
    ) -> PagedLayout:
        """Fresh K and V of the layer's rows are in the cache; returns the keys that attention is to see."""
        return layout

    def keys_attended(self, r: int) -> int | None:
        """How many keys the rows of request ``r`` see; None = all."""
        return None

    def result(self, num_positions: int) -> Finding | None:
        """What was found out, when all layers are over."""
        return None

    def present(self) -> torch.Tensor | None:
        """[N] bool: rows that have reached the end; None = all have."""
        return None
