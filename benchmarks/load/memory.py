"""Resident memory of a server and its processes, sampled over time. Linux."""

from __future__ import annotations

import asyncio
import re
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

MIB = 2**20


@dataclass
class MemoryLog:
    """Resident bytes of each process of the tree under ``root``.

    Attributes:
        samples: (seconds since the log began, bytes by process name) in order of time.
    """

    root: int
    samples: list[tuple[float, Counter[str]]] = field(default_factory=list)
    _begin: float = field(default_factory=time.monotonic)

    def sample(self) -> Counter[str]:
        """Look now, and keep what was seen."""
        seen: Counter[str] = Counter()
        for pid, name in tree(self.root).items():
            seen[name] += _resident(pid)
        self.samples.append((time.monotonic() - self._begin, seen))
        return seen

    async def watch(self, every: float) -> None:
        """Sample until cancelled."""
        while True:
            self.sample()
            await asyncio.sleep(every)


def tree(root: int) -> dict[int, str]:
    """Names of a process and its descendants; vLLM names its own, `VLLM::Worker` for instance."""
    parents, commands = {}, {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(entry.name)] = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
            commands[int(entry.name)] = (entry / "cmdline").read_bytes().decode(errors="replace")
        except OSError:
            continue  # it has ended
    names = {root: "API server"}
    for _ in range(4):
        for pid, parent in parents.items():
            if parent in names and pid not in names:
                own = re.match(r"VLLM::(\w+)", commands[pid])
                names[pid] = own[1] if own else "others"
    return names


def _resident(pid: int) -> int:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    found = re.search(r"VmRSS:\s+(\d+) kB", status)
    return 1024 * int(found[1]) if found else 0  # a process that is ending has none
