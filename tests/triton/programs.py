"""Counts, in Triton's interpreter, the programs of a kernel that find something to do."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest


@contextmanager
def busy_programs() -> Iterator[Counter[str]]:
    """By kernel: how many programs of all launches in this context have multiplied matrices."""
    from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, interpreter_builder

    found: Counter[str] = Counter()
    multiply, start = InterpreterBuilder.create_dot, GridExecutor.__call__
    busy: set[tuple[int, int, int]] = set()

    def dot(self: Any, *args: Any) -> Any:
        busy.add(interpreter_builder.grid_idx)
        return multiply(self, *args)

    def launch(self: Any, *args: Any, **kwargs: Any) -> None:
        busy.clear()
        start(self, *args, **kwargs)
        found[self.fn.__name__] += len(busy)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpreterBuilder, "create_dot", dot)
        patch.setattr(GridExecutor, "__call__", launch)
        yield found
