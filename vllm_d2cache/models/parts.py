"""Rows in parts: what a layer needs beside the residual stream then does not grow with the rows of a step."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch


def parts(num_rows: int, most: int) -> Iterator[slice]:
    """Rows 0 to ``num_rows``, ``most`` at a time."""
    return (slice(first, min(first + most, num_rows)) for first in range(0, num_rows, most))


def in_parts(
    function: Callable[..., tuple[torch.Tensor, ...]], most: int, *rows: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """The results of ``function``, row by row those of its arguments, from at most ``most`` rows at a time."""
    if len(rows[0]) <= most:
        return function(*rows)
    whole: tuple[torch.Tensor, ...] = ()
    for part in parts(len(rows[0]), most):
        results = function(*(x[part] for x in rows))
        # Copied part by part: a result may be a view of more than it shows.
        whole = whole or tuple(x.new_empty(len(rows[0]), *x.shape[1:]) for x in results)
        for all_rows, x in zip(whole, results, strict=True):
            all_rows[part] = x
    return whole
