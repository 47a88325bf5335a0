"""What the host works out of the requests of a batch once, and keeps until other requests have a step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

T = TypeVar("T")


class Standing(Generic[T]):
    """What ``work_out`` makes of the slots of a batch: the same object as long as the batch is the same.

    A slot can go to another request. Whoever owns it calls ``forget`` then.
    """

    def __init__(self, work_out: Callable[[Sequence[int]], T]) -> None:
        self._work_out = work_out
        self._latest: tuple[list[int], T] | None = None

    def of(self, slots: Sequence[int]) -> T:
        """For the requests in these slots, in this order."""
        if self._latest is None or self._latest[0] != slots:
            self._latest = (list(slots), self._work_out(slots))
        return self._latest[1]

    def forget(self) -> None:
        """Some slot has another request."""
        self._latest = None
