"""What a run of pytest skipped and why; a reason that is not on the list fails.

    python tools/skips.py LOG .ci/skips

Reads the lines that `pytest -ra` prints of skipped tests. The list has a reason a line, which must begin a test's own;
empty lines and what follows a ``#`` are comments. Standard library only.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from pathlib import Path

_SKIPPED = re.compile(r"^SKIPPED \[(\d+)\] (\S+?)(?::\d+)?: (.*)$", re.MULTILINE)


def skipped(log: str) -> Counter[tuple[str, str]]:
    """How many tests were skipped, by file and reason."""
    found: Counter[tuple[str, str]] = Counter()
    for count, place, reason in _SKIPPED.findall(log):
        found[place, reason.strip()] += int(count)
    return found


def listed(text: str) -> list[str]:
    """The reasons on a list."""
    lines = (line.partition("#")[0].strip() for line in text.splitlines())
    return [line for line in lines if line]


def main(log: Path, allowed: Path) -> int:
    """Command line: 1 if a reason is not on the list."""
    reasons = listed(allowed.read_text())
    bad = 0
    for (place, reason), count in sorted(skipped(log.read_text(errors="replace")).items()):
        known = any(reason.startswith(start) for start in reasons)
        bad += not known
        print(f"ci: skipped {count} in {place}: {reason}" + ("" if known else f" (not in {allowed.name}: fails)"))
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
