"""Which implementation of an op runs: PyTorch, Triton, or xformers' attention. One switch a device, set at start-up.

Every op with a kernel is written in PyTorch: its twin, which is the specification and the CPU path. ``dispatched``
names the modules whose function of the same name and signature takes over on a device for which another backend has
been chosen. The CPU always runs the twins.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch

BACKENDS = ("triton", "xformers", "torch")

_P = ParamSpec("_P")
_T = TypeVar("_T")

# Backend by device type, but for PyTorch. A process serves one model; like torch.backends, the switch is the process's.
_chosen: dict[str, str] = {}


def chosen(device: torch.device) -> str:
    """The backend of that device: ``torch`` until another one is chosen."""
    return _chosen.get(device.type, "torch")


def choose(backend: str, device: torch.device) -> None:
    """Use ``backend`` on devices of that type from now on; nothing is checked (see ops/backends.py)."""
    if backend not in BACKENDS:
        raise ValueError(f"attention_backend: must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend == "torch":
        _chosen.pop(device.type, None)
    else:
        _chosen[device.type] = backend


def dispatched(triton: str, xformers: str | None = None) -> Callable[[Callable[_P, _T]], Callable[_P, _T]]:
    """Mark a PyTorch twin whose first argument is a tensor; its device decides what runs.

    Args:
        triton: module of the Triton implementation.
        xformers: module of the one that uses xformers; None = Triton's there too.
    """
    modules = {"triton": triton, "xformers": xformers or triton}

    def wrap(twin: Callable[_P, _T]) -> Callable[_P, _T]:
        name = twin.__name__

        @functools.wraps(twin)
        def call(*args: _P.args, **kwargs: _P.kwargs) -> _T:
            if not _chosen:
                return twin(*args, **kwargs)
            first: Any = args[0]
            backend = _chosen.get(first.device.type, "torch")
            if backend == "torch":
                return twin(*args, **kwargs)
            # Triton is imported when it is first needed: machines without a GPU need not have it.
            return getattr(importlib.import_module(modules[backend]), name)(*args, **kwargs)

        return call

    return wrap
