"""Environments beside the main one, each from a file of requirements; quick if nothing has changed.

Packages come from where make_env.py has them from.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from make_env import pip_settings, python_of, run, say, uv_environment

_HINT = "Check pip's configuration (pip config list) and the network."


def bring_up_to_date(venv: Path, requirements: Path, what: str, uv: str | None) -> None:
    """Build the environment anew if its requirements or its Python have changed.

    Args:
        venv: the environment's directory.
        requirements: what it is built from; a copy inside of it tells whether that has changed.
        what: what it is for, for the message.
        uv: builds it; None: venv and pip of the running Python do.

    Raises:
        BuildError: a command has failed.
    """
    stamp, wanted = venv / "requirements.txt", requirements.read_text()
    if stamp.exists() and stamp.read_text() == wanted and python_of(venv) == sys.version_info[:2]:
        return
    say(f"{venv}: {what}")
    if venv.exists():
        shutil.rmtree(venv)
    python = str(venv / "bin" / "python")
    if uv:
        links = [word for link in pip_settings("find-links") for word in ("--find-links", link)]
        make = [uv, "venv", "--quiet", "--python", sys.executable, str(venv)]
        install = [uv, "pip", "install", "--quiet", "--python", python, *links, "-r", str(requirements)]
    else:
        make = [sys.executable, "-m", "venv", str(venv)]
        install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-r", str(requirements)]
    run(make, "making the environment", _HINT)
    run(install, f"installing {what}", _HINT, uv_environment() if uv else None)
    stamp.write_text(wanted)
