"""The numbers of columns, which many ops compare with: made once for each width, as they are the same in every step."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch

from vllm_d2cache.ops.dispatch import chosen


@lru_cache(maxsize=64)
def line_numbers(count: int, device: torch.device) -> torch.Tensor:
    """[count] int64: 0, 1, 2 and so on. Shared: it is never written."""
    return torch.arange(count, device=device)


@lru_cache(maxsize=64)
def columns(width: int, device: torch.device) -> torch.Tensor:
    """[1, width] int64: 0, 1, 2 and so on. Shared: it is never written."""
    return line_numbers(width, device).unsqueeze(0)


@lru_cache(maxsize=64)
def zeros(count: int, device: torch.device) -> torch.Tensor:
    """[count] int64: zeros. Shared: they are never written."""
    return torch.zeros(count, dtype=torch.int64, device=device)


@lru_cache(maxsize=64)
def everybody(count: int, device: torch.device) -> torch.Tensor:
    """[count] bool: True. Shared: it is never written."""
    return torch.ones(count, dtype=torch.bool, device=device)


@lru_cache(maxsize=64)
def nobody(count: int, device: torch.device) -> torch.Tensor:
    """[count] bool: False. Shared: it is never written."""
    return torch.zeros(count, dtype=torch.bool, device=device)


def numbers_of(table: torch.Tensor) -> tuple[Any, ...]:
    """What ``table`` holds, as tuples of numbers, which are kept with it: whoever writes it calls `forget_numbers`.

    For twins of PyTorch: where kernels run, the host would wait.
    """
    found: tuple[Any, ...] | None = table.__dict__.get("_d2cache_numbers")
    if found is None:
        numbers = table.tolist()
        found = table.__dict__["_d2cache_numbers"] = tuple(map(tuple, numbers) if table.dim() > 1 else numbers)
    return found


def forget_numbers(table: torch.Tensor) -> None:
    """``table`` is written."""
    table.__dict__.pop("_d2cache_numbers", None)


def numbers_at(table: torch.Tensor, slots: torch.Tensor) -> tuple[Any, ...]:
    """What ``table`` [S] holds for each of ``slots`` [R], as :func:`numbers_of`."""
    return tuple(map(numbers_of(table).__getitem__, numbers_of(slots)))


def part_of(table: torch.Tensor, lines: int | slice) -> torch.Tensor:
    """``table[lines]``, a view that is kept with the table, which it does not keep in turn: they end together."""
    kept: dict[str, torch.Tensor] = table.__dict__.setdefault("_d2cache_parts", {})
    name = str(lines)
    if (found := kept.get(name)) is None:
        found = kept[name] = table.detach()[lines]
    return found


@lru_cache(maxsize=8)
def no_cells(lines: int, width: int, device: torch.device) -> torch.Tensor:
    """[lines, width] bool: False. Shared: it is never written."""
    return torch.zeros(lines, width, dtype=torch.bool, device=device)


def first_columns(table: torch.Tensor, width: int) -> torch.Tensor:
    """[S, width] of ``table`` [S, L]: itself where it is no wider."""
    return table if width == table.shape[1] else table[:, :width]


def lines_of(table: torch.Tensor, slots: torch.Tensor, width: int) -> torch.Tensor:
    """[R, width]: the first columns of lines ``slots`` [R] of ``table`` [S, L]."""
    return first_columns(table, width).index_select(0, slots)


def cells_of(line: torch.Tensor, column: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Where cells of a ``table`` [S, L] are in it as one row, as ``take`` and ``put_`` count them.

    They cost a fraction of what indexing by two tensors does.

    Args:
        line: int64, of any shape that broadcasts to that of ``column``, also int64.
    """
    return torch.add(column, line, alpha=table.shape[1])


def write_lines(table: torch.Tensor, slots: torch.Tensor, values: torch.Tensor) -> None:
    """Write ``values`` [R, width] into the first columns of lines ``slots`` [R] of ``table`` [S, L]."""
    first_columns(table, values.shape[1]).index_copy_(0, slots, values)


class FirstColumns:
    """The first columns of tables with a line for each slot, as views that are made once: steps are equally wide."""

    _MOST = 64

    def __init__(self) -> None:
        self._views: dict[tuple[int, ...], tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]] = {}

    def of(self, width: int, *tables: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """[S, width] of each table [S, L] where PyTorch reads it on a CPU; elsewhere all of it, as kernels expect."""
        device = tables[0].device
        if device.type != "cpu" or chosen(device) != "torch":
            return tables
        key = (width, *map(id, tables))  # the tables are kept beside their views, so that no others get their ids
        found = self._views.get(key)
        if found is None:
            if len(self._views) == self._MOST:
                self._views.clear()
            found = self._views[key] = (tables, tuple(first_columns(table, width) for table in tables))
        return found[1]
