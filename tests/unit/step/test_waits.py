"""No policy, decoder or other thing that a request may ask makes a step wait more often in a larger batch."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.count.pretended import CUDA, Asked, pretended_device
from benchmarks.count.waits import blocks, measure, measure_admission, mixed, settings
from vllm_d2cache.decoders import DECODER_CLASSES
from vllm_d2cache.ops.host import Numbers, Writes, upload, upload_arrays, upload_lists
from vllm_d2cache.policies import POLICY_CLASSES

ROOT = Path(__file__).parents[3]
WRITTEN = json.loads((ROOT / "benchmarks" / "results" / "waits.json").read_text())["lines"]
SETTINGS, MIXED, BLOCKS = settings(), mixed(), blocks()
# In an exact step: how many rows there are, and one number more of whatever else a request asks.
MOST_WAITS = 2
# What kernels read of the step's layout; then the rows of each request where it is padded, or what a grammar says.
MOST_UPLOADS = 2


@pytest.mark.parametrize("batch", [8, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 64))])
@pytest.mark.parametrize("name", SETTINGS)
def test_waits_and_copies_of_a_step(name: str, batch: int) -> None:
    for form, asked in measure(SETTINGS[name], batch).items():
        assert asked["waits"] <= (0 if form == "padded" else MOST_WAITS), asked["where"]
        assert asked["pageable"] == 0, asked["where"]
        assert asked["pinned"] <= MOST_UPLOADS, asked["where"]


@pytest.mark.parametrize("name", BLOCKS)
def test_waits_and_copies_of_a_step_in_blocks(name: str) -> None:
    """As of all others; each can be padded."""
    found = measure(BLOCKS[name], 8)
    assert set(found) == {"exact", "padded"}
    for form, asked in found.items():
        assert asked["waits"] <= (0 if form == "padded" else MOST_WAITS), asked["where"]
        assert (asked["pageable"], asked["pinned"] <= MOST_UPLOADS) == (0, True), asked["where"]


@pytest.mark.parametrize("name", MIXED)
def test_waits_of_everything_at_once(name: str) -> None:
    """They add up over mechanisms and decoders, not over requests."""
    found = [measure(MIXED[name], len(MIXED[name].options) * n)["exact"] for n in (1, 2)]
    assert found[0]["waits"] == found[1]["waits"]
    assert found[0]["pinned"] == found[1]["pinned"]
    assert found[0]["pageable"] == found[1]["pageable"] == 0, found[0]["where"]


@pytest.mark.parametrize("name", SETTINGS | MIXED | BLOCKS)
def test_an_admission_waits_for_nothing_and_copies_once(name: str) -> None:
    asked = measure_admission((SETTINGS | MIXED | BLOCKS)[name])
    assert (asked["waits"], asked["pageable"], asked["pinned"]) == (0, 0, 1), asked["where"]


def test_every_policy_and_decoder_is_counted() -> None:
    assert {f"policy {name}" for name in POLICY_CLASSES} | {f"decoder {name}" for name in DECODER_CLASSES} <= {
        *SETTINGS
    }
    assert {line["setting"] for line in WRITTEN} == {*SETTINGS, *MIXED, *BLOCKS}


def test_what_is_written_keeps_the_limits_at_every_batch() -> None:
    for line in WRITTEN:
        if line["setting"] in SETTINGS and line["form"] != "admission":
            assert line["waits"] <= (0 if line["form"] == "padded" else MOST_WAITS), line
            assert line["pinned"] <= MOST_UPLOADS, line
        assert line["pageable"] == 0, line


def test_the_document_shows_the_figures_of_the_command() -> None:
    printed = set((ROOT / "benchmarks" / "results" / "waits.md").read_text().splitlines())
    section = (ROOT / "docs" / "performance.md").read_text().split("## Waits and copies")[1].split("\n## ")[0]
    shown = [line for line in section.splitlines() if line.startswith("|")]
    assert len(shown) > 2
    assert set(shown) <= printed


# ---- the pretended device


def asked_by(work: Callable[[torch.Tensor], Any]) -> Asked:
    with pretended_device() as asked:
        work(torch.arange(6, device=CUDA).view(2, 3))
    return asked


@pytest.mark.parametrize(
    "work",
    [
        lambda x: x.tolist(),
        lambda x: x.sum().item(),
        lambda x: bool(x.any()),
        lambda x: int(x[0, 0]),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x.masked_select(x > 0),
        lambda x: x.index_put_((x > 0,), x[0, 0]),
        lambda x: x[0].repeat_interleave(x[0]),
        lambda x: x.cpu(),
    ],
)
def test_a_wait_is_seen(work: Callable[[torch.Tensor], Any]) -> None:
    asked = asked_by(work)
    assert (asked.waits.total(), asked.pageable.total()) == (1, 0)


@pytest.mark.parametrize(
    "work",
    [
        lambda x: torch.tensor([1, 2], device=x.device),
        lambda x: torch.tensor([1, 2]).to(x.device),
        lambda x: torch.tensor([1, 2]).to(x.device, non_blocking=True),
        lambda x: torch.from_numpy(np.zeros(2)).to(x.device, non_blocking=True),
        lambda x: torch.tensor([1, 2], pin_memory=True).to(x.device),
        lambda x: x.new_tensor([1, 2]),
        lambda x: x[[0, 1]],
        lambda x: x[:, torch.tensor([0, 1])],
        lambda x: x[0].copy_(torch.tensor([1, 2, 3])),
    ],
)
def test_a_copy_that_waits_is_seen(work: Callable[[torch.Tensor], Any]) -> None:
    asked = asked_by(work)
    assert (asked.waits.total(), asked.pageable.total(), asked.pinned.total()) == (0, 1, 0)


@pytest.mark.parametrize(
    "work",
    [
        lambda x: upload([1, 2], torch.int32, x.device),
        lambda x: upload_lists([[1, 2], [], [3]], torch.int64, x.device),
        lambda x: upload_arrays([np.zeros((2, 2), dtype=np.float32), np.ones(3, dtype=np.bool_)], x.device),
    ],
)
def test_a_copy_from_pinned_memory_is_seen(work: Callable[[torch.Tensor], Any]) -> None:
    asked = asked_by(work)
    assert (asked.waits.total(), asked.pageable.total(), asked.pinned.total()) == (0, 0, 1)


def test_what_only_computes_neither_waits_nor_copies() -> None:
    def work(x: torch.Tensor) -> None:
        x[0, 1] = 7
        x[x[0].clamp(max=1)].where(x[0] > 1, 5).nonzero_static(size=4)
        torch.zeros(3, device=x.device).fill_(2.0).add_(1)

    asked = asked_by(work)
    assert asked.waits + asked.pageable + asked.pinned == {}
    assert asked.kernels > 8


def test_a_mixture_of_devices_is_refused() -> None:
    with pytest.raises(RuntimeError, match="a tensor of the host among tensors of the device"):
        asked_by(lambda x: x + torch.ones(3))


# ---- ops/host.py


def test_numbers_of_several_types_arrive_in_one_copy() -> None:
    arrays = [np.array([[1.5, -2.0]], dtype=np.float32), np.array([True, False, True]), np.array([1 << 40])]
    got = upload_arrays([*arrays, np.zeros(0, dtype=np.int32)], torch.device("cpu"))
    assert [x.tolist() for x in got] == [[[1.5, -2.0]], [True, False, True], [1 << 40], []]
    assert [x.dtype for x in got] == [torch.float32, torch.bool, torch.int64, torch.int32]
    assert upload_arrays([], torch.device("cpu")) == []


def test_writes_are_made_when_they_are_sent() -> None:
    table, flags = torch.zeros(2, 3, dtype=torch.int32), torch.zeros(4, dtype=torch.bool)
    writes = Writes(torch.device("cpu"))
    writes.put(table[1, :2], [4, 5])
    writes.put(flags, [True, False, True, True])
    assert not table.any()
    writes.send()
    assert table.tolist() == [[0, 0, 0], [4, 5, 0]]
    assert flags.tolist() == [True, False, True, True]


def test_expected_numbers_go_with_the_first_that_are_asked_for() -> None:
    with pretended_device() as asked:
        numbers = Numbers()
        numbers.expect([1, 2], torch.int32)
        numbers.expect([3], torch.int64)
        assert numbers.on(CUDA, [4, 5], torch.int32).tolist() == [4, 5]
        first = numbers.on(CUDA, [1, 2], torch.int32)
        assert first.tolist() == [1, 2]
        assert numbers.on(CUDA, [1, 2], torch.int32) is first
        assert numbers.on(CUDA, [3], torch.int64).tolist() == [3]
        assert asked.pinned.total() == 1
        assert numbers.on(CUDA, [1, 2], torch.int64).tolist() == [1, 2]
    assert asked.pinned.total() == 2
