"""What the numbers of a benchmark were measured on."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Any


def machine() -> dict[str, Any]:
    """Processor, versions, commit, date; for the JSON beside every table."""
    import torch
    import vllm

    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    changed = subprocess.run(["git", "status", "--porcelain", "-uno"], capture_output=True, text=True, check=False)
    return {
        "cpu": model or platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "vllm": vllm.__version__,
        "commit": commit.stdout.strip() + ("+changes" if changed.stdout.strip() else ""),
        "date": time.strftime("%Y-%m-%d"),
    }


def caption(facts: dict[str, Any]) -> str:
    """One line for people."""
    return (
        f"{facts['cpu']}, {facts['cores']} cores, {facts['threads']} threads, torch {facts['torch']}, "
        f"vLLM {facts['vllm']}, commit {facts['commit']}, {facts['date']}"
    )
