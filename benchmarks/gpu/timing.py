"""Time on a GPU, the two ceilings of the card, and what it was measured on."""

from __future__ import annotations

import importlib.metadata
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

# Overwritten before every repetition: nothing a kernel reads is still in the second-level cache.
_FLUSH_BYTES = 256 << 20


@dataclass(frozen=True)
class Ceilings:
    """What the card does at best, measured on the spot."""

    bytes_per_s: float  # device copy, read plus write
    flops_per_s: float  # bf16 matrix product

    def floor_ms(self, num_bytes: float, flops: float) -> float:
        """No kernel that moves so many bytes and does so many operations can be faster."""
        return 1e3 * max(num_bytes / self.bytes_per_s, flops / self.flops_per_s)


class Clock:
    """Median milliseconds of a call on ``device``.

    Args:
        dry: on a CPU without the flush: shows that a benchmark runs, measures nothing worth keeping.
    """

    def __init__(self, device: torch.device, repetitions: int = 30, dry: bool = False) -> None:
        self.device, self.repetitions, self.dry = device, 1 if dry else repetitions, dry
        self._flush = torch.empty(0 if dry else _FLUSH_BYTES, dtype=torch.uint8, device=device)

    def __call__(self, call: Callable[[], Any]) -> float:
        if self.dry:
            start = time.perf_counter()
            call()
            return 1e3 * (time.perf_counter() - start)
        for _ in range(3):
            call()
        times = []
        for _ in range(self.repetitions):
            self._flush.zero_()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            call()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end))
        return statistics.median(times)


class Stopwatch:
    """Time of what runs inside it, on the device where there is one: a context manager."""

    def __init__(self, device: torch.device) -> None:
        self._events = None
        if device.type == "cuda":
            self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        self._times = [0.0, 0.0]

    def _mark(self, which: int) -> None:
        if self._events is not None:
            self._events[which].record()
        else:
            self._times[which] = time.perf_counter()

    def __enter__(self) -> None:
        self._mark(0)

    def __exit__(self, *error: object) -> None:
        self._mark(1)

    def ms(self) -> float:
        """Of the last time; the device must be synchronised."""
        if self._events is not None:
            return self._events[0].elapsed_time(self._events[1])
        return 1e3 * (self._times[1] - self._times[0])


def synchronize(device: torch.device) -> None:
    """Wait for the device, if it is one that can be waited for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def ceilings(clock: Clock) -> Ceilings:
    """Device copy of 1 GiB, bf16 product of two 8192 x 8192 matrices."""
    size, side = (1 << 16, 64) if clock.dry else (1 << 30, 8192)
    source = torch.zeros(size, dtype=torch.uint8, device=clock.device)
    target = torch.empty_like(source)
    copy_ms = clock(lambda: target.copy_(source))
    a, b = (torch.randn(side, side, device=clock.device).bfloat16() for _ in range(2))
    product_ms = clock(lambda: a @ b)
    return Ceilings(2 * size / copy_ms * 1e3, 2 * side**3 / product_ms * 1e3)


def facts(device: torch.device) -> dict[str, Any]:
    """Card, versions, commit, date."""

    def version(name: str) -> str:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return "not installed"

    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    changed = subprocess.run(["git", "status", "--porcelain", "-uno"], capture_output=True, text=True, check=False)
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else f"{platform.machine()} (no GPU: not a measurement)",
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        **{name: version(name) for name in ("triton", "xformers", "vllm")},
        "commit": commit.stdout.strip() + ("+changes" if changed.stdout.strip() else ""),
        "date": time.strftime("%Y-%m-%d"),
    }
