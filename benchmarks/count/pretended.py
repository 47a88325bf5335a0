"""A pretended CUDA device: tensors that say they lie on one and keep their numbers in host memory.

Seen are the operators that a step dispatches, so that a machine without a GPU knows what one would be asked: how often
the host waits for it, and what is copied to it from where. A mixture of devices raises, as on a real one. Ops that have
a kernel count as one, and their twins work out the numbers; what the kernels' own host code does is not run, but what
it takes of the layout (how many rows, which keys) is.
"""

from __future__ import annotations

import copy
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, is_dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from vllm_d2cache.ops import dispatch
from vllm_d2cache.ops.paged_attention import AttentionMaps, PagedLayout

CUDA = torch.device("cuda", 0)
PACKAGE = str(Path(dispatch.__file__).parents[1])

# Operators whose result, or the size of it, the host reads.
_READ = {
    "_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "bincount",
    "_unique2", "unique_dim", "unique_consecutive",
}  # fmt: skip
_INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}
# They neither compute nor copy.
_FREE = {"detach", "lift_fresh", "_unsafe_view", "empty", "empty_strided", "empty_like", "new_empty", "resize_"}


@dataclass
class Asked:
    """What a device was asked.

    Attributes:
        waits: how often the host waited for it, by place in the source.
        pinned: copies from pinned memory that nobody waits for, likewise.
        pageable: copies from any other memory, likewise; the host waits for each.
        kernels: operators that compute, and ops that have a kernel.
    """

    waits: Counter[str] = field(default_factory=Counter)
    pinned: Counter[str] = field(default_factory=Counter)
    pageable: Counter[str] = field(default_factory=Counter)
    kernels: int = 0


class OnDevice(torch.Tensor):
    """A tensor that says it lies on the device."""

    numbers: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, numbers: torch.Tensor) -> OnDevice:
        self = torch.Tensor._make_wrapper_subclass(
            cls,
            numbers.size(),
            strides=numbers.stride(),
            storage_offset=numbers.storage_offset(),
            dtype=numbers.dtype,
            device=torch.device("meta"),
        )
        self.numbers = numbers
        return self  # type: ignore[no-any-return]

    device = property(lambda self: CUDA)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"OnDevice({tuple(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{func}: tensors of the pretended device are used outside of it")


def plain(x: Any) -> Any:
    """``x`` with its numbers in host memory, records and lists included; they share memory."""
    if isinstance(x, OnDevice):
        return x.numbers
    if isinstance(x, tuple) and hasattr(x, "_fields"):
        return type(x)(*map(plain, x))
    if isinstance(x, list | tuple):
        return type(x)(map(plain, x))
    if is_dataclass(x) and not isinstance(x, type):
        made = copy.copy(x)
        made.__dict__.update({name: plain(value) for name, value in vars(x).items()})
        return made
    return x


def on_device(x: Any) -> Any:
    """``x`` with its tensors on the device, records and lists included; they share memory."""
    if isinstance(x, torch.Tensor):
        return x if isinstance(x, OnDevice) else OnDevice(x)
    if isinstance(x, tuple) and hasattr(x, "_fields"):
        return type(x)(*map(on_device, x))
    if isinstance(x, list | tuple):
        return type(x)(map(on_device, x))
    if is_dataclass(x) and not isinstance(x, type):
        made = copy.copy(x)
        made.__dict__.update({name: on_device(value) for name, value in vars(x).items()})
        return made
    return x


def _place() -> str:
    """The line of the package that asks."""
    frame = sys._getframe(1)
    found = "elsewhere"
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(PACKAGE):
            found = f"{name[len(PACKAGE) + 1 :]}:{frame.f_lineno}"
            if not name.endswith("ops/host.py"):
                break
        frame = frame.f_back  # type: ignore[assignment]
    return found


class _Operators(TorchDispatchMode):
    def __init__(self, asked: Asked, pinned: set[int], kept: list[torch.Tensor]) -> None:
        super().__init__()
        self.asked, self.pinned, self.kept = asked, pinned, kept

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.ops.prim.device.default:
            return CUDA
        tensors = list(_tensors((*args, *kwargs.values())))
        here = any(isinstance(x, OnDevice) for x in tensors)
        target = kwargs.get("device")
        to_device = target is not None and torch.device(target).type in ("cuda", "meta")
        if here or to_device:
            self._note(func, args, kwargs, tensors, to_device)
        pin = kwargs.pop("pin_memory", None)
        if to_device:
            kwargs["device"] = torch.device("cpu")
        result = func(*[plain(x) for x in args], **{name: plain(x) for name, x in kwargs.items()})
        if pin:
            self.pinned.add(result.untyped_storage().data_ptr())
            self.kept.append(result)
        name = func._schema.name
        if name == "aten::_local_scalar_dense" or (name == "aten::_to_copy" and target is not None and not to_device):
            return result
        if not (here or to_device):
            return result
        if any(a.alias_info is not None and a.alias_info.is_write for a in func._schema.arguments):
            out = kwargs.get("out")
            written = (out if isinstance(out, tuple) else (out,)) if out is not None else args
            return written[0] if not isinstance(result, tuple) else tuple(written[: len(result)])
        return on_device(result)

    def _note(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], tensors: list[torch.Tensor], to_device: bool
    ) -> None:
        name, asked = func._schema.name.partition("::")[2], self.asked
        if name in ("_to_copy", "copy_"):
            self._note_copy(name, args, kwargs, to_device)
            return
        host = [x for x in tensors if not isinstance(x, OnDevice) and x.dim() > 0]
        masks = name in _INDEXING and any(_is_mask(x) for x in args[1] if x is not None)
        if name in _READ or masks or (name == "repeat_interleave" and kwargs.get("output_size") is None):
            asked.waits[_place()] += 1
        elif host and name in _INDEXING:
            asked.pageable[_place()] += 1
            host = []
        if host:
            raise RuntimeError(f"{func} at {_place()}: a tensor of the host among tensors of the device")
        asked.kernels += not _is_view(func) and name not in _FREE

    def _note_copy(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], to_device: bool) -> None:
        asked = self.asked
        source = args[1] if name == "copy_" else args[0]
        target = args[0] if name == "copy_" else None
        blocking = not (args[2] if name == "copy_" and len(args) > 2 else kwargs.get("non_blocking", False))
        from_device = isinstance(source, OnDevice)
        there = isinstance(target, OnDevice) if name == "copy_" else to_device or kwargs.get("device") is None
        if from_device and not there:
            asked.waits[_place()] += 1
        elif not from_device and source.dim() == 0 and name == "copy_":
            asked.kernels += 1  # a number of Python's
        elif not from_device:
            is_pinned = source.untyped_storage().data_ptr() in self.pinned and not blocking
            (asked.pinned if is_pinned else asked.pageable)[_place()] += 1
        else:
            asked.kernels += 1


def _tensors(values: Any) -> Iterator[torch.Tensor]:
    for x in values:
        if isinstance(x, torch.Tensor):
            yield x
        elif isinstance(x, list | tuple):
            yield from _tensors(x)


def _is_mask(x: torch.Tensor) -> bool:
    return x.dtype in (torch.bool, torch.uint8)


def _is_view(func: Any) -> bool:
    returns = func._schema.returns
    return bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)


class _Functions(TorchFunctionMode):
    """What reaches no operator: making tensors of Python's numbers, and reading them."""

    def __init__(self, asked: Asked, pinned: set[int], kept: list[torch.Tensor]) -> None:
        super().__init__()
        self.asked, self.pinned, self.kept = asked, pinned, kept

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = dict(kwargs or {}), getattr(func, "__name__", "")
        if name in ("tensor", "as_tensor") and not isinstance(args[0], torch.Tensor):
            return self._made(func, args, kwargs)
        first = args[0] if args else None
        if name == "new_tensor" and isinstance(first, OnDevice):
            self.asked.pageable[_place()] += 1
            with _disable_current_modes():
                return OnDevice(torch.tensor(args[1], dtype=kwargs.get("dtype", first.dtype)))
        if name == "pin_memory" and not isinstance(first, OnDevice):
            self._pin(first)
            return first
        if name in ("tolist", "item", "numpy", "__array__") and isinstance(first, OnDevice):
            self.asked.waits[_place()] += 1
            return getattr(first.numbers, name)()
        if name in ("__getitem__", "__setitem__") and isinstance(first, OnDevice):
            args = (first, self._index(args[1]), *args[2:])
        return func(*args, **kwargs)

    def _index(self, index: Any) -> Any:
        """An index with its lists on the device."""
        if isinstance(index, tuple):
            return tuple(self._index(part) for part in index)
        if not isinstance(index, list):
            return index
        self.asked.pageable[_place()] += 1
        with _disable_current_modes():
            return OnDevice(torch.tensor(index))

    def _made(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
        pin, device = kwargs.pop("pin_memory", False), kwargs.pop("device", None)
        with _disable_current_modes():
            made: torch.Tensor = func(*args, **kwargs)
        if pin:
            self._pin(made)
        if device is None or torch.device(device).type != "cuda":
            return made
        self.asked.pageable[_place()] += 1
        return OnDevice(made)

    def _pin(self, tensor: torch.Tensor) -> None:
        self.pinned.add(tensor.untyped_storage().data_ptr())
        self.kept.append(tensor)  # or its address would soon be another tensor's


def _kernel(asked: Asked, name: str) -> Callable[..., Any]:
    """In place of the kernel of an op: its twin, by name."""
    ops = [module for key, module in list(sys.modules.items()) if key.startswith("vllm_d2cache.ops.")]
    twin = next(f.__wrapped__ for m in ops if hasattr(f := getattr(m, name, None), "__wrapped__"))

    def call(*args: Any, **kwargs: Any) -> Any:
        asked.kernels += 1
        for x in args:
            if isinstance(x, PagedLayout):
                _ = x.row_starts, x.text_lengths, x.visible_keys
            elif isinstance(x, AttentionMaps) and x.plan.elements:
                x.plan.starts_on(CUDA)
        with _disable_current_modes():
            result = twin(*[plain(x) for x in args], **{key: plain(x) for key, x in kwargs.items()})
        return on_device(result)

    return call


class _Kernels(SimpleNamespace):
    def __getattr__(self, name: str) -> Callable[..., Any]:
        return _kernel(self.asked, name)


@contextmanager
def pretended_device() -> Iterator[Asked]:
    """Within it :data:`CUDA` can be used, though there is none."""
    asked, pinned, kept = Asked(), set[int](), list[torch.Tensor]()
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(torch.cuda, "_lazy_init", lambda *args, **kwargs: None))
        stack.enter_context(mock.patch.dict(dispatch._chosen, {"cuda": "triton"}))
        modules = SimpleNamespace(import_module=lambda module: _Kernels(asked=asked))
        stack.enter_context(mock.patch.object(dispatch, "importlib", modules))
        stack.enter_context(torch.no_grad())
        stack.enter_context(_Functions(asked, pinned, kept))
        stack.enter_context(_Operators(asked, pinned, kept))
        yield asked
