"""What a CUDA graph does, without a GPU: operators and kernel launches recorded with the memory they touched.

A replay repeats each of them on the same tensors, and puts results where they stood. Numbers that Python computed
while recording stay as they were: a size baked into a grid, a list uploaded from the host, a tensor of one batch that
nobody copies the next batch into. Reading the device while recording is an error, as on a GPU, and so is an upload.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.waits import Waits, around_launches


class _Recording(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.steps: list[Callable[[], Any]] = []
        self.launches = 0
        self._inside = False

    def launch(self, launch: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.steps.append(lambda: launch(*args, **kwargs))
        self.launches += 1
        self._inside = True
        try:
            return launch(*args, **kwargs)
        finally:
            self._inside = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if not self._inside:
            inputs = {_memory(t) for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
            # Views have nothing to compute, and what writes in place finds its own way.
            fresh = [
                t if isinstance(t, torch.Tensor) and _memory(t) not in inputs else None for t in tree_leaves(result)
            ]
            writes = any(a.alias_info is not None and a.alias_info.is_write for a in func._schema.arguments)
            if writes or any(t is not None for t in fresh):
                self.steps.append(lambda: _again(func, args, kwargs, fresh))
        return result


class _NoUploads(TorchFunctionMode):
    """A copy from the host would be repeated from memory that is long somebody else's."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        assert name not in ("tensor", "as_tensor"), f"torch.{name} while a graph is recorded"
        return func(*args, **(kwargs or {}))


def _no_upload(array: Any) -> torch.Tensor:
    """In place of torch.from_numpy, which is no function that a mode sees."""
    raise AssertionError("torch.from_numpy while a graph is recorded")


def _again(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], fresh: list[torch.Tensor | None]) -> None:
    for target, value in zip(fresh, tree_leaves(func(*args, **kwargs)), strict=True):
        if target is not None:
            target.copy_(value)


def _memory(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class Emulator:
    """Records as engine/cuda_graphs.py does (graphs.step_graphs.Recorder).

    Attributes:
        graphs: recorded so far.
        launches: kernels in the last one.
    """

    def __init__(self) -> None:
        self.graphs = self.launches = 0

    def record(self, step: Callable[[], None]) -> Callable[[], None]:
        step()  # as on a GPU, once to warm up
        recording = _Recording()
        no_views = patch.object(torch, "from_numpy", _no_upload)
        with Waits() as waits, around_launches(recording.launch), no_views, _NoUploads(), recording:
            step()
        assert not waits.found, f"a capture would fail on {dict(waits.found)}"
        self.graphs += 1
        self.launches = recording.launches

        def replay() -> None:
            for repeat in recording.steps:
                repeat()

        return replay
