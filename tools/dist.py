"""Build wheel and sdist, install into an empty environment, and serve the tiny checkpoint from there (`make dist`).

    .venv/bin/python tools/dist.py           # dist/*.whl, dist/*.tar.gz, dist/cpu/vllm-*.whl; then the trial
    .venv/bin/python tools/dist.py --no-trial

The wheel is built from the sdist, so that what is missing there is missing in both. The trial is a user's first hour on
the kind of machine this is: an environment with the wheel, its extra and nothing of this repository; in another folder
`vllm-d2cache doctor`, then `vllm serve` and a question whose answer is known.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console

from check_packed import missing
from make_env import ROOT, BuildError, detect_backend, ensure_uv, install_packages, run, say
from serving import ServerError, ask, server

DIST = ROOT / "dist"
QUESTION, ANSWER = "Reverse: abcdefgh", "hgfedcba"


def build() -> tuple[Path, Path]:
    """The wheel of the package, and that of the name `vllm` for the CPU build, both into dist/.

    Raises:
        BuildError: the build fails, or leaves out a file of the package.
    """
    shutil.rmtree(DIST, ignore_errors=True)
    hint = "The build takes setuptools from the index that pip is configured for (pip config list)."
    command = [sys.executable, "-m", "build", "--outdir"]
    run([*command, str(DIST), str(ROOT)], "building wheel and sdist", hint)
    run([*command, str(DIST / "cpu"), "--wheel", str(ROOT / "tools/packaging/vllm")], "building the name vllm", hint)
    (wheel,), (name,) = DIST.glob("*.whl"), (DIST / "cpu").glob("*.whl")
    if problems := missing(wheel, *DIST.glob("*.tar.gz")):
        raise BuildError("; ".join(problems))
    return wheel, name


def try_out(wheel: Path, name: Path, backend: str) -> None:
    """Install into an empty environment and serve from there.

    Raises:
        BuildError, ServerError: something of it does not work.
    """
    uv = ensure_uv(Path(sys.prefix), shutil.which("uv"))
    with tempfile.TemporaryDirectory() as scratch:
        venv, work = Path(scratch) / "venv", Path(scratch) / "work"
        work.mkdir()
        run([uv, "venv", "--quiet", "--python", sys.executable, str(venv)], "making an empty environment", "")
        wanted = [f"{wheel}[{backend}]", *([str(name)] if backend == "cpu" else [])]
        install_packages(venv, backend, wanted, uv)
        where = subprocess.run(
            [venv / "bin/python", "-c", "import vllm_d2cache; print(vllm_d2cache.__file__)"],
            cwd=work, capture_output=True, text=True, check=True,
        ).stdout.strip()  # fmt: skip
        if not Path(where).is_relative_to(venv):
            raise BuildError(f"the package is read from {where}, not from the environment that was just built")
        model = shutil.copytree(ROOT / "models/tiny-llada", work / "tiny-llada")
        run([str(venv / "bin/vllm-d2cache"), "doctor", "--model", str(model)], "vllm-d2cache doctor", "")
        with server(str(model), work, Console(), executable=venv / "bin/vllm", cwd=work) as url:
            answer = ask(url, QUESTION)
        if answer != ANSWER:
            raise BuildError(f"{QUESTION!r} was answered with {answer!r}, not {ANSWER!r}")
        say(f"served from {wheel.name}: {QUESTION!r} -> {answer!r}")


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--no-trial", action="store_true", help="build only")
    parser.add_argument("--backend", choices=("cpu", "cuda"), default=detect_backend(), help="of the trial")
    args = parser.parse_args()
    os.environ.pop("PYTHONPATH", None)
    try:
        wheel, name = build()
        if not args.no_trial:
            try_out(wheel, name, args.backend)
    except (BuildError, ServerError, subprocess.CalledProcessError) as error:
        print(f"dist: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
