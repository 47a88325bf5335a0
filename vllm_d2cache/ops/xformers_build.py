"""What the installed xformers was compiled for, from its files alone: xformers and torch are not imported.

Its FlashAttention kernels are a compiled library, which loads beside the release of torch that it was compiled for. Its
Triton kernel (split-K) is Python, runs beside any torch, and takes pages of certain sizes only.
"""

from __future__ import annotations

import json
from importlib.metadata import PackageNotFoundError, distribution

# Positions of a KV block: xformers' Triton kernel takes multiples of these.
PAGE = 64


def compiled_for() -> str | None:
    """The release of torch, such as ``2.10.0+cu128``; None where xformers is not installed or does not say."""
    try:
        path = distribution("xformers").locate_file("xformers/cpp_lib.json")
        with open(str(path)) as file:
            return str(json.load(file)["version"]["torch"])
    except (PackageNotFoundError, OSError, ValueError, KeyError, TypeError):
        return None


def only_triton(torch_release: str) -> str:
    """Why its compiled kernels cannot be had beside this release of torch; empty if they can."""
    built = compiled_for()
    if built is None:
        return "it has no compiled kernels"
    if built.split(".")[:2] == torch_release.split(".")[:2]:
        return ""
    return f"its compiled kernels are for torch {built}, this is {torch_release}"
