"""Operators and waits of a step, by TorchDispatchMode.

On a GPU every operator that is not a view is a kernel, or more than one; ops that have a Triton kernel count as one and
are stubbed. What is read on the host (``tolist``, ``item``, ``nonzero``) is a wait there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from vllm_d2cache.ops import canvas_columns, packing
from vllm_d2cache.ops import row_stats as statistics

# Kernels that PyTorch launches for one of these, at least.
_LAUNCHES = {"sort": 3, "topk": 3, "cumsum": 1, "nonzero": 3}
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
        elif not _is_view(func) and name not in ("detach", "lift_fresh", "_unsafe_view"):
            self.kernels[name] += _LAUNCHES.get(name, 1)
        return func(*args, **(kwargs or {}))


def _is_view(func: Any) -> bool:
    returns = func._schema.returns
    return bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)


@contextmanager
def counted_kernels() -> Iterator[tuple[Count, Counter[str]]]:
    """Count operators, and calls of ops that have a kernel of their own; these do nothing but have the right shapes."""
    launched: Counter[str] = Counter()

    def tile_stats(
        logits: torch.Tensor, params: Any, mask: int, margin: bool, entropy: bool, scaled: bool = False
    ) -> Any:
        launched["tile_stats"] += 1
        token, score = _FIXED[: len(logits)]
        return statistics.RowStats(token, score, score if margin else None, score if entropy else None)

    def certainty_density(known: torch.Tensor, canvas_len: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        launched["certainty_density"] += 1
        return _ONES[: known.shape[0], : known.shape[1]]

    def counted(op: Any) -> Any:
        def call(*args: Any) -> Any:
            launched[op.__name__] += 1
            with _disable_current_modes():
                return op(*args)

        return call

    with ExitStack() as stack:
        for op in (canvas_columns.to_positions, canvas_columns.to_slots):
            stack.enter_context(mock.patch(f"vllm_d2cache.canvas.view.{op.__name__}", counted(op)))
        stack.enter_context(mock.patch("vllm_d2cache.step.rows.pack_columns", counted(packing.pack_columns)))
        for module in ("vllm_d2cache.step.decoding", "vllm_d2cache.policies.d2cache"):
            stack.enter_context(mock.patch(f"{module}.certainty_density", certainty_density))
        stack.enter_context(mock.patch.object(statistics, "tile_stats", tile_stats))
        stack.enter_context(mock.patch.object(statistics, "chosen", lambda device: "triton"))
        count, tolist = Count(), torch.Tensor.tolist

        def waiting(self: torch.Tensor) -> Any:
            count.waits["tolist"] += 1
            return tolist(self)

        stack.enter_context(mock.patch.object(torch.Tensor, "tolist", waiting))
        # On a GPU nobody asks whether a text lies in consecutive blocks.
        stack.enter_context(mock.patch("vllm_d2cache.step.pages.chosen", lambda device: "triton"))
        yield stack.enter_context(count), launched


class _Fixed:
    """Token 7 with a confidence that falls from row to row."""

    def __getitem__(self, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        return _TOKENS[rows], _SCORES[rows]


_TOKENS, _SCORES = torch.full((1 << 14,), 7), torch.linspace(0.9, 0.1, 1 << 14)
_FIXED = _Fixed()
_ONES = torch.ones(256, 4096)
