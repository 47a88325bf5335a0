"""Kernels that are started on CPU tensors run there, as compiled for an H100, in one order of warps after the other."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from triton.runtime.jit import JITFunction

from tests.triton.hopper import each_launch
from tests.triton.ptx.machine import Machine, Order
from tests.triton.ptx.memory import Memory, Region
from tests.triton.ptx.ops import step_of
from tests.triton.ptx.parse import Program


class Race(Exception):
    """Of a kernel that leaves another memory when its warps run in another order."""


@contextmanager
def warps(*orders: Order) -> Iterator[set[str]]:
    """Kernels started in this context run; their names are found in the set.

    Args:
        orders: each launch runs in each of them, from the same memory; all of them by default.

    Raises:
        Race: what two orders leave differs in a bit.
        Fault: of an address that is nobody's, and whatever else a GPU would not do.
    """
    names: set[str] = set()

    def start(function: JITFunction[Any], kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any]) -> None:
        names.add(function.__name__)
        _run(function.__name__, kernel, grid, arguments, orders or tuple(Order))

    with each_launch(start):
        yield names


def _run(name: str, kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any], orders: tuple[Order, ...]) -> None:
    variables = {key: kind for key, kind in kernel.src.signature.items() if kind != "constexpr"}
    tensors = {key: arguments[key] for key in variables if isinstance(arguments[key], torch.Tensor)}
    content = {key: _bytes(tensor) for key, tensor in tensors.items()}
    memory = Memory([Region(x.data_ptr(), x.numpy()) for x in content.values()])
    parameters = [_bits(arguments[key], kind) for key, kind in variables.items()]
    machine = _machine(kernel.asm["ptx"], int(kernel.metadata.shared))
    before = {key: x.clone() for key, x in content.items()}
    first: dict[str, torch.Tensor] = {}
    for order in orders:
        for key, x in content.items():
            x.copy_(before[key])
        machine.launch(grid, parameters, memory, order)
        if not first:
            first = {key: x.clone() for key, x in content.items()}
        differing = [key for key, x in content.items() if not torch.equal(x, first[key])]
        if differing:
            raise Race(f"{name}: {', '.join(differing)} by the order of warps, {orders[0].value} or {order.value}")


@cache
def _machine(ptx: str, shared_bytes: int) -> Machine:
    return Machine(Program(ptx), step_of, shared_bytes)


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """All that the tensor's memory holds, [bytes] uint8: a kernel may reach what lies beside a slice."""
    return torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())


def _bits(value: Any, kind: str) -> int:
    if isinstance(value, torch.Tensor):
        return value.data_ptr()
    if kind.startswith("fp"):
        return int.from_bytes(struct.pack({"fp32": "<f", "fp64": "<d"}[kind], value), "little")
    return int(value) & ((1 << 64) - 1)
