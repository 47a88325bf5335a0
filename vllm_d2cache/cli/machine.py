"""What figures were measured on, and the most memory a piece of work took."""

from __future__ import annotations

import os
import platform
import time
from pathlib import Path
from typing import Any

_STATUS, _CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def machine() -> dict[str, Any]:
    """Processor or GPU, versions and date."""
    import torch
    import vllm

    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else cpu or platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "vllm": vllm.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }


def caption(facts: dict[str, Any]) -> str:
    """One line for people."""
    return (
        f"{facts['device']}, {facts['cores']} cores, {facts['threads']} threads, Python {facts['python']}, "
        f"torch {facts['torch']}, vLLM {facts['vllm']}, {facts['date']}"
    )


def reset_peak() -> None:
    """Peaks count from here. Without the rights for it (on CPU), they go on counting from the start of the process."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        try:
            _CLEAR_REFS.write_text("5")
        except OSError:
            return


def peak_bytes() -> int | None:
    """Most memory since the last reset: allocated on the GPU, else resident in this process; None if unknown."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    if not _STATUS.exists():
        return None
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])
