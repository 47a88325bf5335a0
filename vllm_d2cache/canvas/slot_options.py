"""Options of running requests as columns with a line for each slot."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from vllm_d2cache.ops.columns import forget_numbers
from vllm_d2cache.options.request import RequestOptions
from vllm_d2cache.options.types import Choice, Number

# More than any text has positions, and far from overflow.
_LARGEST = 1 << 40


class SlotOptions:
    """A column for each of ``specs``: int64 for integers and for choices (index into their values), float64 else."""

    def __init__(self, specs: Mapping[str, Number | Choice], num_slots: int, device: torch.device) -> None:
        self.specs = specs
        self.columns = {
            name: torch.zeros(num_slots, dtype=_column_type(spec), device=device) for name, spec in specs.items()
        }

    def set(self, slot: int, options: RequestOptions) -> None:
        """Take down the options of the request that gets ``slot``."""
        for name, spec in self.specs.items():
            value = options.value(name)
            number = spec.values.index(value) if isinstance(spec, Choice) else min(value, _LARGEST)
            self.columns[name][slot] = number
            forget_numbers(self.columns[name])


def _column_type(spec: Number | Choice) -> torch.dtype:
    return torch.float64 if isinstance(spec, Number) and spec.kind is float else torch.int64
