"""Build the environment of the server's clients (`make clients`, `make fuzz`, `make eval`); quick if nothing changed.

    .venv/bin/python tools/make_clients_env.py .venv    # .venv-clients, by uv: the user's or that of .venv

It is apart from vLLM's so that neither decides the versions of the other. Packages come from where make_env.py has them
from.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from make_env import ROOT, BuildError, ensure_uv, pip_settings, python_of, run, say, uv_environment

VENV = ROOT / ".venv-clients"
REQUIREMENTS = ROOT / "tests" / "clients" / "requirements.txt"
STAMP = VENV / "requirements.txt"  # what it was built from


def build(main_venv: Path) -> None:
    """Bring the environment up to date.

    Args:
        main_venv: the environment of make_env.py.
    """
    wanted = REQUIREMENTS.read_text()
    if STAMP.exists() and STAMP.read_text() == wanted and python_of(VENV) == sys.version_info[:2]:
        return
    say(f"{VENV}: clients of the server")
    if VENV.exists():
        shutil.rmtree(VENV)
    uv, hint = ensure_uv(main_venv, shutil.which("uv")), "Check pip's configuration (pip config list) and the network."
    run([uv, "venv", "--quiet", "--python", sys.executable, str(VENV)], "making the environment", hint)
    links = [word for link in pip_settings("find-links") for word in ("--find-links", link)]
    command = [
        uv,
        "pip",
        "install",
        "--quiet",
        "--python",
        str(VENV / "bin" / "python"),
        *links,
        "-r",
        str(REQUIREMENTS),
    ]
    run(command, "installing the clients", hint, uv_environment())
    STAMP.write_text(wanted)


if __name__ == "__main__":
    try:
        build(Path(sys.argv[1]).absolute())
    except BuildError as error:
        sys.exit(f"make_clients_env: error: {error}")
