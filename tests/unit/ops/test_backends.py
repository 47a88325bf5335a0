"""The dispatcher, and the reasons a backend gives for not running. What kernels compute is in tests/triton."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from vllm_d2cache.ops import dispatch, xformers_attention, xformers_build
from vllm_d2cache.ops.backends import BackendError, reasons, select_backend
from vllm_d2cache.ops.paged_attention import AttentionShape
from vllm_d2cache.options.server import ATTENTION_BACKENDS
from vllm_d2cache.options.types import OptionError
from vllm_d2cache.requests.resolve import parse_server_options

CPU = torch.device("cpu")
SHAPE = AttentionShape(4, 2, 64, 16, torch.float32)


@pytest.fixture(autouse=True)
def nothing_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_chosen", {})


def test_the_option_lists_what_there_is() -> None:
    assert set(ATTENTION_BACKENDS) == set(dispatch.BACKENDS)
    for name in ATTENTION_BACKENDS:
        assert parse_server_options({"attention_backend": name}).attention_backend == name
    assert parse_server_options({"attention_backend": None}).attention_backend is None
    with pytest.raises(OptionError, match=r"attention_backend.*'triton', 'xformers', 'torch'"):
        parse_server_options({"attention_backend": "flash"})


@pytest.mark.parametrize("asked", [None, "torch"])
def test_a_cpu_runs_torch(asked: str | None) -> None:
    assert select_backend(asked, CPU, SHAPE) == "torch"
    assert dispatch.chosen(CPU) == "torch"


@pytest.mark.parametrize("asked", ["triton", "xformers"])
def test_a_cpu_refuses_what_needs_a_gpu(asked: str) -> None:
    with pytest.raises(BackendError, match=rf"(?s)'{asked}' cannot run on cpu:.*NVIDIA GPU.*to torch"):
        select_backend(asked, CPU, SHAPE)
    assert dispatch.chosen(CPU) == "torch"


def test_every_reason_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    found = reasons("xformers", CPU, SHAPE)
    assert len(found) == 3
    assert [word in text for word, text in zip(("GPU", "triton", "xformers"), found, strict=True)] == [True] * 3


class Installed:
    """A distribution with this text in the file that says what it was compiled for; None: no such file."""

    def __init__(self, root: Path, text: str | None) -> None:
        self.root = root
        if text is not None:
            (root / "xformers").mkdir()
            (root / "xformers" / "cpp_lib.json").write_text(text)

    def locate_file(self, name: str) -> Path:
        return self.root / name


@pytest.mark.parametrize(
    ("text", "release", "why"),
    [
        ('{"version": {"torch": "2.10.0+cu128"}}', "2.14.0+cu130", "are for torch 2.10.0+cu128, this is 2.14.0+cu130"),
        ('{"version": {"torch": "2.10.0+cu128"}}', "2.1.0", "are for torch 2.10.0+cu128, this is 2.1.0"),
        ('{"version": {"torch": "2.14.0+cu130"}}', "2.14.1", ""),
        (None, "2.14.0", "no compiled kernels"),
        ("{", "2.14.0", "no compiled kernels"),
        ('{"version": null}', "2.14.0", "no compiled kernels"),
    ],
)
def test_what_xformers_was_compiled_for(
    text: str | None, release: str, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(xformers_build, "distribution", lambda name: Installed(tmp_path, text))
    found = xformers_build.only_triton(release)
    assert why in found
    assert bool(found) == bool(why)


def test_what_an_operator_can_do_about_xformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(xformers_build, "compiled_for", lambda: "1.0.0")
    pages, other = (xformers_attention._in_short(AttentionShape(4, 2, 64, size, torch.float32)) for size in (16, 128))
    assert "--block-size 64 or a multiple, this is 16" in pages[1]
    assert len(other) == 1
    assert "only its Triton kernel is left" in other[0]


def test_there_is_no_other_backend() -> None:
    with pytest.raises(ValueError, match="attention_backend"):
        dispatch.choose("flash", CPU)


def test_the_device_of_the_first_argument_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels, other = ModuleType("fake_kernels"), ModuleType("fake_xformers")
    kernels.half = lambda x, by=2: "kernel"  # type: ignore[attr-defined]
    other.half = lambda x, by=2: "xformers"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "fake_kernels", kernels)
    monkeypatch.setitem(sys.modules, "fake_xformers", other)

    def half(x: torch.Tensor, by: int = 2) -> str:
        return f"twin {by}"

    plain = dispatch.dispatched("fake_kernels")(half)
    special = dispatch.dispatched("fake_kernels", xformers="fake_xformers")(half)
    x, meta = torch.zeros(1), torch.zeros(1, device="meta")
    assert plain(x, by=3) == "twin 3"
    dispatch.choose("triton", CPU)
    assert (plain(x), special(x), plain(meta)) == ("kernel", "kernel", "twin 2")
    dispatch.choose("xformers", CPU)
    assert (plain(x), special(x)) == ("kernel", "xformers")
    dispatch.choose("torch", CPU)
    assert (plain(x), special(x)) == ("twin 2", "twin 2")
