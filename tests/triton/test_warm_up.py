"""What requests launch has been launched before: every kernel in every specialisation, as Triton tells them apart."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from tests.triton.conftest import INTERPRETED
from tests.triton.loop import HEAD, HEADS, PAGE, Loop
from vllm_d2cache.engine.warm_up import Place, warm_up
from vllm_d2cache.ops import dispatch
from vllm_d2cache.options.sampling import SamplingSpec

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="launches are looked at in the interpreter")

TEXTS = [(80, 13), (40, 9)]
GREEDY = SamplingSpec()
SAMPLED = SamplingSpec(temperature=0.8, top_p=0.9, seed=4)
REQUESTS: list[tuple[list[dict[str, Any]], SamplingSpec]] = [
    ([{"current_k": 5}, {"current_k": 3, "tokens_per_step": 2}], GREEDY),
    ([{"current_k": 5, "threshold": 0.5}, {"factor": 0.8, "policy": "full"}], GREEDY),
    ([{"current_k": 5, "score": "margin"}, {"decoder": "eb", "gamma": 0.5, "policy": "prefix", "window": 4}], SAMPLED),
    ([{"policy": "full", "score": "entropy"}, {"policy": "full", "threshold": 0.4}], SAMPLED),
]


def specialisation(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """By what Triton tells compiled kernels apart: types, alignment of pointers and of numbers, constants."""
    given = {**dict(zip(function.arg_names, args, strict=False)), **kwargs}
    plain = set(function.kwargs.get("do_not_specialize") or ())
    found = []
    for name, parameter in inspect.signature(function.fn).parameters.items():
        value = given[name]
        if isinstance(value, torch.Tensor):
            found.append((name, str(value.dtype), value.data_ptr() % 16 == 0))
        elif "constexpr" in str(parameter.annotation):
            found.append((name, str(value)))
        elif isinstance(value, int) and name not in plain:
            found.append((name, value == 1, value % 16 == 0))
        else:
            found.append((name, type(value).__name__))
    return function.fn.__name__, *found


@contextmanager
def launched() -> Iterator[set[tuple[Any, ...]]]:
    """Every (kernel, specialisation) that is launched in this context."""
    from triton.runtime.interpreter import InterpretedFunction

    found: set[tuple[Any, ...]] = set()
    stock = InterpretedFunction.run

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        found.add(specialisation(self, args, kwargs))
        return stock(self, *args, grid=grid, warmup=warmup, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpretedFunction, "run", run)
        yield found


def place_of(loop: Loop) -> Place:
    hidden = torch.empty(0, HEADS * HEAD, device=loop.device)
    blocks, width = loop.caches[0].shape[0], loop.table.shape[1]
    return Place(loop.steps.worker, loop.forward, lambda x: x @ loop.head, hidden, blocks, PAGE, width, 1000)


def serve(loop: Loop) -> None:
    """A first step, exact and padded ones, together and alone."""
    loop.step(padded=False)
    padded = loop.steps.forms.can_pad([0, 1])
    loop.step(padded=padded)
    loop.step(padded=False)
    for slot in (0, 1):
        loop.step(padded=loop.steps.forms.can_pad([slot]), slots=[slot])


def test_requests_launch_nothing_that_the_warm_up_has_not(
    monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    loops = [Loop(device, options, sampling, TEXTS) for options, sampling in REQUESTS]
    assert warm_up(place_of(loops[0])) == 0, "PyTorch compiles nothing"
    monkeypatch.setitem(dispatch._chosen, device.type, "triton")
    with launched() as known:
        assert warm_up(place_of(loops[0]), sizes=(1, 2)) > 20
    with launched() as used:
        for loop in loops:
            serve(loop)
    assert len({name for name, *_ in used}) > 12
    cold = used - known
    assert not cold, sorted(cold)


def test_a_kernel_that_was_left_out_is_noticed(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    """Planted fault: nobody has asked for draws."""
    from vllm_d2cache.engine import warm_up as module

    monkeypatch.setitem(dispatch._chosen, device.type, "triton")
    monkeypatch.setattr(module, "_kinds", lambda: [([{}], GREEDY)])
    loop = Loop(device, {"current_k": 3}, SAMPLED, [(40, 9), (30, 8)])
    with launched() as known:
        warm_up(place_of(loop), sizes=(2,))
    with launched() as used:
        loop.step(padded=False)
    assert {name for name, *_ in used - known} >= {"_sampling_kernel"}
