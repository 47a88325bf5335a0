"""Kernels compiled for a Hopper GPU on any machine: the wrappers run on CPU tensors, and what they launch is compiled.

Nothing runs on a device. What comes out is what a GPU would be given: its machine code, shared memory and local memory.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

HOPPER = GPUTarget("cuda", 90, 32)
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel, and the machine code that a GPU would run."""

    name: str
    grid: tuple[int, ...]
    kernel: Any  # triton.compiler.CompiledKernel

    @property
    def shared_memory(self) -> int:
        """Bytes of one block."""
        return int(self.kernel.metadata.shared)

    @cached_property
    def local_memory(self) -> int:
        """Bytes of one thread: its stack, and registers that did not fit."""
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(self.kernel.asm["cubin"])
            file.flush()
            report = subprocess.check_output([CUOBJDUMP, "-res-usage", file.name], text=True)
        usage = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", report)}
        return usage["STACK"] + usage["LOCAL"]


@contextmanager
def launches(target: GPUTarget = HOPPER) -> Iterator[list[Launch]]:
    """Kernels started in this context are compiled for ``target`` and listed; none runs."""
    found: list[Launch] = []
    stock_run, stock_driver = JITFunction.run, driver._active

    def run(self: JITFunction[Any], *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = stock_run(self, *args, grid=grid, warmup=True, **kwargs)
        found.append(Launch(self.__name__, tuple(grid), kernel))
        return kernel

    device = SimpleNamespace(
        get_current_target=lambda: target,
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
    )
    JITFunction.run = run
    driver.set_active(device)
    try:
        yield found
    finally:
        JITFunction.run = stock_run
        driver._active = stock_driver
