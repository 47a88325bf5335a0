"""The seam between a step and what a policy or a decoder needs of the layers beyond fresh K and V.

Either *uses* mechanisms (:class:`Use`); a policy asks for a step's share of each in its plan (:class:`Wish`). A
mechanism keeps wishes and memories by slot. In a step it opens a :class:`Hook`, which the layers call, and which may
find something out (:class:`Finding`). The step itself knows nothing of any mechanism but this file.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch

from vllm_d2cache.canvas.lines import Lines
from vllm_d2cache.canvas.rows import ExtraRows, StepRows
from vllm_d2cache.canvas.standing import Standing
from vllm_d2cache.canvas.states import CanvasStates
from vllm_d2cache.canvas.traits import FamilyTraits
from vllm_d2cache.canvas.view import CanvasView
from vllm_d2cache.ops.host import upload
from vllm_d2cache.ops.paged_attention import AttentionMaps, PagedLayout
from vllm_d2cache.ops.rollout import TensorParallel
from vllm_d2cache.options.server import ServerOptions

# What a mechanism can need of the layers, or take from them. In every layer:
KEYS = "keys"  # each row sees all keys of its text
ROWS = "rows"  # every row of the step is computed
FRESH = "fresh K and V of the whole text in every step"

F = TypeVar("F", bound="Finding")


@dataclass(frozen=True)
class Worker:
    """What everything with a line for each slot is made from."""

    num_slots: int  # requests that can run at a time
    max_len: int  # most positions a request can have
    device: torch.device
    traits: FamilyTraits
    server: ServerOptions = ServerOptions({})  # noqa: RUF009  # frozen
    tensor_parallel: TensorParallel | None = None
    vocab_size: int | None = None  # None: the first logits of a step show it


class RequestSize(NamedTuple):
    """What the memory of a running request is worked out from."""

    layers: int
    row_bytes: int  # of a hidden state
    prompt_len: int
    canvas_len: int
    row_budget: int  # most rows of its text in a step after the first

    @property
    def length(self) -> int:
        """Positions, T."""
        return self.prompt_len + self.canvas_len


@dataclass(frozen=True)
class Use(ABC):
    """That a policy or a decoder uses a mechanism, and how: what is known before anything is allocated."""

    name: ClassVar[str]
    needs: ClassVar[frozenset[str]] = frozenset()
    """What it needs of all layers: nothing else of the same request may take it."""
    takes: ClassVar[frozenset[str]] = frozenset()
    """What it takes from the layers."""
    takes_padding: ClassVar[bool] = False
    """Whether steps with padding rows are all the same to it, and it waits for nothing: such steps can be graphs."""

    @abstractmethod
    def make(self, worker: Worker) -> Mechanism:
        """The mechanism; one serves all requests."""

    def request_bytes(self, size: RequestSize) -> int:
        """What a running request holds."""
        return 0

    def extra_rows(self, window: int) -> int:
        """Most rows behind the text in a step, where ``window`` positions may be committed at a time."""
        return 0


def conflict(uses: Iterable[Use], takes: frozenset[str] = frozenset()) -> str | None:
    """Why these cannot serve one request, or None.

    Args:
        takes: what the policy itself takes from the layers.
    """
    uses = list(uses)
    takers = [("the policy", takes), *((use.name, use.takes) for use in uses)]
    for use in uses:
        for name, taken in takers:
            if name != use.name and (lacking := taken & use.needs):
                return f"{use.name} and {name}: the one needs {' and '.join(sorted(lacking))}, which the other takes"
    return None


@dataclass(frozen=True)
class Wish:
    """What a policy asks of a mechanism for the next step; tensors have a line for each row of the plan."""

    use: ClassVar[type[Use]]


class Finding(Lines):
    """What a hook has found out, a frozen dataclass."""


def finding(found: Iterable[Finding], kind: type[F]) -> F:
    """The one of that kind; there is one where some request of the step uses its mechanism."""
    return next(f for f in found if isinstance(f, kind))


Ask = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(hidden [v, d], request [v], slot [v], token [v]) -> [v] float32, the probability of each token at its slot under the
request's own sampling parameters."""


class Members(dict[int, Use]):
    """Rows of the batch whose requests use a mechanism, and how."""

    _flags: torch.Tensor | None = None

    def flags(self, num_requests: int, device: torch.device) -> torch.Tensor | None:
        """[R] bool: which rows of the batch they are; None where all of them are."""
        if len(self) == num_requests:
            return None
        if self._flags is None:
            self._flags = upload([r in self for r in range(num_requests)], torch.bool, device)
        return self._flags


class Mechanism(ABC):
    """State of one mechanism for all requests that use it.

    Slot-indexed tensors, its ``tables``, exist while some request uses it.
    """

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self._tables: dict[str, Any] = {}

    def tables(self) -> dict[str, Any]:
        """Attributes that it has while some request uses it, made anew when the first one begins."""
        return {}

    def allocate(self) -> None:
        """A request begins to use it, and no other does."""
        self._tables = self.tables()
        vars(self).update(self._tables)

    def release(self) -> None:
        """No request uses it any more."""
        for name in self._tables:
            delattr(self, name)
        self._tables = {}

    @abstractmethod
    def open(self, rows: StepRows, members: Members, canvas: CanvasStates) -> Hook:
        """Its part of a step.

        Args:
            members: the same object as in the step before if its batch was the same.
            canvas: of the running requests; read only.
        """

    def store(self, view: CanvasView, wish: Any) -> None:
        """Keep the wish until the next step."""
        raise NotImplementedError(f"{type(self).__name__} takes no wishes")

    def forget(self, slot: int) -> None:  # noqa: B027
        """The request in ``slot`` has ended, or starts over."""


class Hook:
    """A mechanism's part of one forward pass. Every method does nothing unless it is overridden."""

    chooses_rows: ClassVar[bool] = False
    """Whether layers differ in their rows: PartialForward then runs them."""
    extra: ExtraRows | None = None
    """Rows that it adds behind the text."""

    def place(self, layout: PagedLayout) -> None:
        """Before the forward pass: where K and V of the text's rows go."""

    def before_attention(
        self, query: torch.Tensor, kv_cache: torch.Tensor, scale: float, layout: PagedLayout
    ) -> PagedLayout:
        """Fresh K and V of the layer's rows are in the cache; returns the keys that attention is to see."""
        return layout

    def maps(
        self, query: torch.Tensor, kv_cache: torch.Tensor, scale: float, layout: PagedLayout
    ) -> AttentionMaps | None:
        """Where attention is to leave its maps; None = nowhere. One hook of a step has any."""
        return None

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        layout: PagedLayout,
        scale: float,
        output: torch.Tensor,
    ) -> None:
        """Attention of its extra rows [S, heads, head size] and fresh K and V of theirs; writes ``output``."""

    def read(self, hidden: torch.Tensor, ask: Ask) -> None:
        """Final hidden states [v, d] of the rows that ``extra`` asked for."""

    def keys_attended(self, r: int) -> int | None:
        """How many keys the rows of request ``r`` see; None = all."""
        return None

    def present(self) -> torch.Tensor | None:
        """[N - S] bool: rows of the text that have reached the end; None = all have."""
        return None

    def most_predicted(self) -> int | None:
        """Of how many rows that are ``present`` the logits are read at most; None = only the device knows."""
        return None

    def result(self, num_positions: int) -> Finding | None:
        """What was found out, when all layers are over and ``read`` has been called."""
        return None


class Mechanisms:
    """The mechanisms that running requests use. Each is made for the first request that does.

    Args:
        canvas: of the running requests; read only.
    """

    def __init__(self, worker: Worker, canvas: CanvasStates) -> None:
        self.worker = worker
        self.canvas = canvas
        self._made: dict[type[Use], Mechanism] = {}
        self._uses: dict[int, tuple[Use, ...]] = {}  # slot -> uses of its request
        self._standing = Standing(self._members)

    def enter(self, slot: int, uses: tuple[Use, ...]) -> None:
        """The request in ``slot`` begins."""
        self.leave(slot)
        for use in uses:
            kind = type(use)
            if kind not in self._made:
                self._made[kind] = use.make(self.worker)
            if not self._used(kind):
                self._made[kind].allocate()
        self._uses[slot] = uses
        self._standing.forget()

    def leave(self, slot: int) -> None:
        """The request in ``slot`` has ended, or starts over."""
        self._standing.forget()
        for use in self._uses.pop(slot, ()):
            self._made[type(use)].forget(slot)
            if not self._used(type(use)):
                self._made[type(use)].release()

    def _used(self, kind: type[Use]) -> bool:
        return any(type(use) is kind for uses in self._uses.values() for use in uses)

    def uses(self, slot: int) -> tuple[Use, ...]:
        """What the request in ``slot`` uses."""
        return self._uses[slot]

    def store(self, view: CanvasView, wishes: Iterable[Wish]) -> None:
        """Keep the wishes of a plan until the next step."""
        for wish in wishes:
            self._made[wish.use].store(view, wish)

    def open(self, rows: StepRows) -> tuple[Hook, ...]:
        """A hook of each mechanism that some request of the step uses."""
        members = self._standing.of(rows.slots)
        return tuple(self._made[kind].open(rows, mine, self.canvas) for kind, mine in members.items())

    def take_padding(self, slots: Sequence[int]) -> bool:
        """Whether none that these requests use minds padding rows."""
        return all(use.takes_padding for mine in self._standing.of(slots).values() for use in mine.values())

    def _members(self, slots: Sequence[int]) -> dict[type[Use], Members]:
        members: dict[type[Use], Members] = {}
        for r, slot in enumerate(slots):
            for use in self._uses[slot]:
                members.setdefault(type(use), Members())[r] = use
        return members
