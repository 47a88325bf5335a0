"""Build the environment of the server's clients (`make clients`, `make fuzz`, `make eval`); quick if nothing changed.

    .venv/bin/python tools/make_clients_env.py .venv    # .venv-clients, by uv: the user's or that of .venv

It is apart from vLLM's so that neither decides the versions of the other.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from make_env import ROOT, BuildError, ensure_uv
from side_env import bring_up_to_date


def build(main_venv: Path) -> None:
    """Bring the environment up to date.

    Args:
        main_venv: the environment of make_env.py.
    """
    uv = ensure_uv(main_venv, shutil.which("uv"))
    bring_up_to_date(ROOT / ".venv-clients", ROOT / "tests/clients/requirements.txt", "clients of the server", uv)


if __name__ == "__main__":
    try:
        build(Path(sys.argv[1]).absolute())
    except BuildError as error:
        sys.exit(f"make_clients_env: error: {error}")
