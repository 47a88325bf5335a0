"""Whether wheel and sdist have every file of the package: templates and pages are no modules, and are easily left out.

python tools/check_packed.py dist/*.whl dist/*.tar.gz    # exit status 1 and the names, if not. Standard library only.
"""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def packed(file: Path) -> set[str]:
    """Names of the files in a wheel, or in an sdist below its one folder."""
    if file.suffix == ".whl":
        with zipfile.ZipFile(file) as opened:
            return set(opened.namelist())
    with tarfile.open(file) as archive:
        return {name.partition("/")[2] for name in archive.getnames()}


def missing(*files: Path) -> list[str]:
    """For each file that lacks something of the package, what it lacks."""
    listing = subprocess.run(["git", "ls-files", "vllm_d2cache"], cwd=ROOT, capture_output=True, text=True, check=True)
    wanted = set(listing.stdout.split())
    return [f"{file.name} lacks {', '.join(sorted(lost))}" for file in files if (lost := wanted - packed(file))]


if __name__ == "__main__":
    sys.exit("\n".join(missing(*map(Path, sys.argv[1:]))) or 0)
