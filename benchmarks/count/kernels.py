"""Operators and waits of a step, by TorchDispatchMode.

On a GPU every operator that is not a view is a kernel, or more than one; ops that have a Triton kernel count as one and
are stubbed. What is read on the host (``tolist``, ``item``, ``nonzero``) is a wait there.
"""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from vllm_d2cache.ops import dispatch
from vllm_d2cache.ops import row_stats as statistics

# Kernels that PyTorch launches for one of these, at least.
_LAUNCHES = {"sort": 3, "topk": 3, "cumsum": 1, "nonzero": 3}
# Operators that launch nothing.
_NOTHING = ("detach", "lift_fresh", "_unsafe_view", "empty", "empty_like", "empty_strided", "new_empty")
_TOLIST = torch.Tensor.tolist
# Operators after which the host knows a number.
_WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "equal")


class Count(TorchDispatchMode):
    """Counts while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.partition("::")[2]
        if name in _WAITS:
            self.waits[name] += 1
        elif not _is_view(func) and name not in _NOTHING:
            self.kernels[name] += _LAUNCHES.get(name, 1)
        return func(*args, **(kwargs or {}))


def _is_view(func: Any) -> bool:
    returns = func._schema.returns
    return bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)


class _Launched:
    """In place of a module of Triton kernels: counts its ops, and lets their twins do the work."""

    def __init__(self, module: str, launched: Counter[str]) -> None:
        self.twins = importlib.import_module(module.replace(".triton.", "."))
        self.launched = launched

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def launch(*args: Any, **kwargs: Any) -> Any:
            self.launched[name] += 1
            # What a twin reads of its arguments, its kernel does not.
            read = mock.patch.object(torch.Tensor, "tolist", _TOLIST)
            with _disable_current_modes(), mock.patch.dict(dispatch._chosen, cpu="torch"), read:
                return getattr(self.twins, name).__wrapped__(*args, **kwargs)

        return _tile_stats(self.launched) if name == "tile_stats" else launch


def _tile_stats(launched: Counter[str]) -> Callable[..., Any]:
    def tile_stats(
        logits: torch.Tensor, params: Any, mask: int, margin: bool, entropy: bool, scaled: bool = False
    ) -> Any:
        launched["tile_stats"] += 1
        token, score = _FIXED[: len(logits)]
        return statistics.RowStats(token, score, score if margin else None, score if entropy else None)

    return tile_stats


@contextmanager
def counted_kernels() -> Iterator[tuple[Count, Counter[str]]]:
    """Count operators, and ops that have a kernel of their own: one each, whatever PyTorch would do in its place."""
    launched: Counter[str] = Counter()
    count = Count()

    def waiting(self: torch.Tensor) -> Any:
        count.waits["tolist"] += 1
        return _TOLIST(self)

    modules = SimpleNamespace(import_module=lambda module: _Launched(module, launched))
    with (
        mock.patch.dict(dispatch._chosen, cpu="triton"),
        mock.patch.object(dispatch, "importlib", modules),
        mock.patch.object(torch.Tensor, "tolist", waiting),
        count,
    ):
        yield count, launched


class _Fixed:
    """Token 7 with a confidence that falls from row to row."""

    def __getitem__(self, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        return _TOKENS[rows], _SCORES[rows]


_TOKENS, _SCORES = torch.full((1 << 14,), 7), torch.linspace(0.9, 0.1, 1 << 14)
_FIXED = _Fixed()
