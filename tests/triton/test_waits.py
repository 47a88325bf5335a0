"""A padded step waits for the device nowhere: seen by its operators, on CPU too, and by CUDA's own check on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.triton.loop import Loop
from tests.waits import Waits
from vllm_d2cache.canvas.request import SamplingSpec
from vllm_d2cache.ops import dispatch

GREEDY, SAMPLED = SamplingSpec(), SamplingSpec(temperature=0.8, top_p=0.9, seed=4)
CASES: list[tuple[dict[str, Any], SamplingSpec]] = [
    ({"current_k": 4, "rollout_p": 0.05, "window": 8, "score": "margin"}, SAMPLED),
    ({"policy": "prefix", "window": 6, "threshold": 0.4}, GREEDY),
    ({"current_k": 3, "confidence_memory": "latest", "decoder": "eb", "gamma": 0.5}, GREEDY),
]


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> Iterator[None]:
    monkeypatch.setitem(dispatch._chosen, device.type, "triton")
    return


@pytest.mark.skipif("torch.cuda.is_available()", reason="a GPU is asked itself")
@pytest.mark.parametrize(("options", "sampling"), CASES)
def test_a_padded_step_reads_nothing_from_the_device(
    options: dict[str, Any], sampling: SamplingSpec, device: torch.device
) -> None:
    loop = Loop(device, options, sampling)
    loop.step(padded=False)
    with Waits() as waits:
        loop.step()
        loop.step()
    assert waits.operators > 200
    assert waits.found == {}
    with Waits() as waits:
        loop.step(padded=False)
    assert waits.found == {"tolist": 1}, "an exact step waits once"


@pytest.mark.skipif("not torch.cuda.is_available()", reason="no GPU")
@pytest.mark.parametrize(("options", "sampling"), CASES)
def test_cuda_finds_no_wait_in_a_padded_step(
    options: dict[str, Any], sampling: SamplingSpec, device: torch.device
) -> None:
    loop = Loop(device, options, sampling)
    loop.step(padded=False)
    loop.step()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        loop.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(("options", "sampling"), CASES)
def test_kernels_decide_the_same_in_padded_steps(
    options: dict[str, Any], sampling: SamplingSpec, device: torch.device
) -> None:
    exact, padded = Loop(device, options, sampling), Loop(device, options, sampling)
    for step in range(5):
        want, got = exact.step(padded=False), padded.step(padded=step > 0)
        assert torch.equal(got.committed, want.committed), step
        assert torch.equal(got.tokens, want.tokens), step
        assert torch.equal(padded.steps.canvas.refresh, exact.steps.canvas.refresh), step


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x.sum().item(),
        lambda x: x.tolist(),
        lambda x: bool(x.any()),
        lambda x: x.masked_select(x > 0),
        lambda x: x.masked_fill_(x > 0, 1).index_put_((x > 0,), x[0]),
        lambda x: torch.tensor([1, 2], device=x.device),
        lambda x: torch.arange(3, device=x.device).repeat_interleave(torch.ones(3, dtype=torch.int64, device=x.device)),
    ],
)
def test_a_wait_is_seen(wait: Any, device: torch.device) -> None:
    if device.type == "cuda":
        pytest.skip("CUDA's own check is used there")
    with Waits() as waits:
        wait(torch.ones(3))
    assert waits.found
