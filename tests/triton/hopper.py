"""Kernels compiled for an NVIDIA GPU on any machine: the wrappers run on CPU tensors, what they launch is compiled.

Nothing runs on a device. What comes out is what a GPU would be given: its machine code, registers, shared memory and
local memory.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
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

# A100, RTX 30, RTX 40 and L4, H100, B200, RTX 50.
ARCHITECTURES = (80, 86, 89, 90, 100, 120)
TARGETS = {arch: GPUTarget("cuda", arch, 32) for arch in ARCHITECTURES}
HOPPER = TARGETS[90]
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel, and the machine code that a GPU would run."""

    name: str
    grid: tuple[int, ...]
    kernel: Any  # triton.compiler.CompiledKernel

    @property
    def architecture(self) -> int:
        """As the machine code has it, 90 for an H100."""
        found = re.search(r"\.target\s+sm_(\d+)", self.kernel.asm["ptx"])
        assert found is not None
        return int(found[1])

    @property
    def constants(self) -> dict[str, Any]:
        """What it was specialised for, by the names of its parameters."""
        source = self.kernel.src
        return {source.fn.arg_names[path[0]]: value for path, value in source.constants.items()}

    @property
    def warps(self) -> int:
        """Of one block."""
        return int(self.kernel.metadata.num_warps)

    @property
    def registers(self) -> int:
        """Of one thread."""
        return self._usage["REG"]

    @property
    def shared_memory(self) -> int:
        """Bytes of one block."""
        return int(self.kernel.metadata.shared)

    @property
    def local_memory(self) -> int:
        """Bytes of one thread: its stack, and registers that did not fit."""
        return self._usage["STACK"] + self._usage["LOCAL"]

    @cached_property
    def _usage(self) -> dict[str, int]:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(self.kernel.asm["cubin"])
            file.flush()
            report = subprocess.check_output([CUOBJDUMP, "-res-usage", file.name], text=True)
        return {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", report)}


@contextmanager
def each_launch(see: Callable[..., None], target: GPUTarget = HOPPER) -> Iterator[None]:
    """Kernels started in this context are compiled for ``target`` and handed over; none runs.

    Args:
        see: takes the function, the compiled kernel, the grid, and the arguments by the names of parameters.
    """
    stock_run, stock_driver = JITFunction.run, driver._active

    def run(self: JITFunction[Any], *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = stock_run(self, *args, grid=grid, warmup=True, **kwargs)
        see(self, kernel, tuple(grid), {**dict(zip(self.arg_names, args, strict=False)), **kwargs})
        return kernel

    device = SimpleNamespace(
        get_current_target=lambda: target,
        # Triton remembers what it has compiled by the number of the device: each target is another one.
        get_current_device=lambda: target.arch,
        get_current_stream=lambda device: 0,
    )
    JITFunction.run = run
    driver.set_active(device)
    try:
        yield
    finally:
        JITFunction.run = stock_run
        driver._active = stock_driver


@contextmanager
def launches(target: GPUTarget = HOPPER) -> Iterator[list[Launch]]:
    """Kernels started in this context are compiled for ``target`` and listed; none runs."""
    found: list[Launch] = []

    def see(function: JITFunction[Any], kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any]) -> None:
        found.append(Launch(function.__name__, grid, kernel))

    with each_launch(see, target):
        yield found
