"""Finds, without a GPU, what would make the host wait for one: operators and methods whose result the host reads."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

# Operators whose result, or the size of it, is read from the device.
_OPERATORS = {
    "aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal", "aten::is_nonzero",
    "aten::_unique2", "aten::unique_dim", "aten::unique_consecutive", "aten::bincount",
    "aten::repeat_interleave.Tensor",
}  # fmt: skip
# Methods that hand memory to Python without an operator where the tensor is on the CPU.
_METHODS = {"tolist", "item", "numpy", "__bool__", "__int__", "__float__", "__index__", "__array__", "cpu"}


@contextmanager
def around_launches(wrap: Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]) -> Iterator[None]:
    """Have every launch of a kernel in Triton's interpreter go through ``wrap(launch, args, kwargs)``."""
    from triton.runtime.interpreter import GridExecutor

    stock = GridExecutor.__call__

    def launch(self: Any, *args: Any, **kwargs: Any) -> Any:
        return wrap(lambda *a, **k: stock(self, *a, **k), args, kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GridExecutor, "__call__", launch)
        yield


class Waits(TorchDispatchMode):
    """Counts what would wait; a kernel's own doings in the interpreter are not looked at.

    Attributes:
        found: by name.
        operators: how many operators were seen at all.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()
        self.operators = 0
        self._inside = 0

    def __enter__(self) -> Waits:
        self._launches = around_launches(self._launch)
        self._launches.__enter__()
        self._methods = _Methods(self)
        self._methods.__enter__()
        return super().__enter__()  # type: ignore[return-value]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, traceback)
        self._methods.__exit__(kind, error, traceback)
        self._launches.__exit__(kind, error, traceback)

    def _launch(self, launch: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._inside += 1
        try:
            return launch(*args, **kwargs)
        finally:
            self._inside -= 1

    def see(self, name: str) -> None:
        """Note a wait."""
        if not self._inside:
            self.found[name] += 1

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.operators += not self._inside
        name = func._schema.name
        if func.overloadpacket._qualified_op_name == "aten::repeat_interleave" and "output_size" in (kwargs or {}):
            name = ""
        if name in _OPERATORS or f"{name}.{func._overloadname}" in _OPERATORS:
            self.see(name)
        if name in ("aten::index", "aten::index_put", "aten::index_put_") and any(
            isinstance(i, torch.Tensor) and i.dtype in (torch.bool, torch.uint8) for i in args[1]
        ):
            self.see(f"{name} with a mask")
        return func(*args, **(kwargs or {}))


class _Methods(TorchFunctionMode):
    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self.waits = waits

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name in _METHODS:
            self.waits.see(name)
        elif name == "tensor" and "device" in (kwargs or {}) and not (kwargs or {}).get("pin_memory"):
            # From pageable memory to the device: the copy blocks (ops/host.py does not).
            self.waits.see("torch.tensor(..., device)")
        return func(*args, **(kwargs or {}))
