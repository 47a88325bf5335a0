"""What requests launch has been launched before: every kernel in every specialisation, as Triton tells them apart.

Nothing is compiled or run: the wrappers of the kernels run, Triton says which compiled kernel it would look for, and
the twins do the work.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from triton.runtime import driver
from triton.runtime.jit import JITFunction, compute_cache_key

from benchmarks.count.waits import Batch, Setting, blocks, mixed, settings
from tests.triton.conftest import INTERPRETED
from tests.triton.hopper import HOPPER
from vllm_d2cache.engine import warm_up as module
from vllm_d2cache.engine.warm_up import Place, warm_up
from vllm_d2cache.ops import dispatch
from vllm_d2cache.options.request import SCORES
from vllm_d2cache.options.sampling import SamplingSpec
from vllm_d2cache.step.pages import Pages

pytestmark = pytest.mark.skipif(INTERPRETED, reason="the interpreter tells no specialisations apart")

CPU = torch.device("cpu")
PAGE, MAX_LEN = 16, 352
TEXTS = [(301, 19), (20, 24), (33, 7), (64, 16)]
# What requests can ask besides where texts are cut into blocks.
IN_BLOCKS = {
    "blocks, sampled": Setting(
        ({"policy": "block"}, {"policy": "block", "threshold": 0.5}), (SamplingSpec(0.8, 0.9, 6, 3),), block=4
    ),
    "blocks, all scores": Setting(tuple({"policy": "block", "score": score} for score in SCORES), block=4),
    "blocks, decoders": Setting(
        tuple({"policy": "block", "decoder": d} for d in ("eb", "klass", "sequential", "edit")), block=4
    ),
    "blocks, grammar": Setting(({"policy": "block"},), grammar=True, block=4),
}


@cache
def twin_of(op: str) -> Callable[..., Any]:
    """In PyTorch; modules of twins and of kernels differ in names."""
    ops = [module for name, module in list(sys.modules.items()) if name.startswith("vllm_d2cache.ops.")]
    twin: Callable[..., Any] = next(f.__wrapped__ for m in ops if hasattr(f := getattr(m, op, None), "__wrapped__"))
    return twin


class _Both:
    """In place of a module of Triton's wrappers: they run, and then their twins, whose results count."""

    def __init__(self, name: str) -> None:
        self.kernels = importlib.import_module(name)

    def __getattr__(self, op: str) -> Callable[..., Any]:
        twin = twin_of(op)

        def call(*args: Any, **kwargs: Any) -> Any:
            getattr(self.kernels, op)(*args, **kwargs)
            with pytest.MonkeyPatch.context() as patch:
                patch.setitem(dispatch._chosen, "cpu", "torch")
                return twin(*args, **kwargs)

        return call


@contextmanager
def launched() -> Iterator[set[tuple[str, str]]]:
    """(kernel, the key of a compiled one) of all launches in this context."""
    found: set[tuple[str, str]] = set()

    def run(self: JITFunction[Any], *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        _, keys, _, _, bind = self.device_caches[0]
        _, specialisation, options = bind(*args, **{"debug": False, **kwargs})
        found.add((self.__name__, compute_cache_key(keys, specialisation, options)))

    device = SimpleNamespace(
        get_current_target=lambda: HOPPER, get_current_device=lambda: 0, get_current_stream=lambda device: 0
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JITFunction, "run", run)
        patch.setattr(driver, "_active", device)
        patch.setattr(dispatch, "importlib", SimpleNamespace(import_module=_Both))
        patch.setitem(dispatch._chosen, "cpu", "triton")
        yield found


def place_of(batch: Batch) -> Place:
    blocks = batch.network.layers[0].pages.shape[0]
    return Place(batch.runner.worker, batch.layers, batch.network.logits, blocks, PAGE, 1000)


def batch_of(setting: Setting, n: int) -> Batch:
    return Batch(setting, n, CPU, TEXTS, MAX_LEN)


@cache
def warmed(block: int) -> frozenset[tuple[str, str]]:
    """What the warm-up launches for a family, where ``block`` is not 0 one whose texts are cut into such blocks."""
    place = place_of(batch_of(Setting(({"policy": "block"},), block=block) if block else Setting(({},)), 2))
    assert warm_up(place) == 0, "PyTorch compiles nothing"
    with launched() as found:
        assert warm_up(place) > (30 if block else 100)
    return frozenset(found)


@pytest.fixture
def known() -> frozenset[tuple[str, str]]:
    """Of a family whose rows see all of their text."""
    return warmed(0)


@pytest.mark.parametrize("batch", [1, 3, 8])
@pytest.mark.parametrize("name", settings() | mixed() | blocks() | IN_BLOCKS)
def test_requests_launch_nothing_that_the_warm_up_has_not(name: str, batch: int) -> None:
    setting = (settings() | mixed() | blocks() | IN_BLOCKS)[name]
    known = warmed(setting.block)
    with launched() as used:
        requests = batch_of(setting, batch)
        for _ in range(6 if setting.block else 4):  # the next block is entered
            requests.step()
            if requests.runner.forms.can_pad(requests.host):
                requests.step(padded=True)
    assert len({kernel for kernel, _ in used}) > 8
    assert not used - known, sorted(used - known)


def test_pieces_of_prompts_launch_nothing_else() -> None:
    """A step that only fills, and one in which some requests are filled and others decide."""
    known = warmed(4)
    with launched() as used:
        requests = batch_of(Setting(({"policy": "block"},), block=4), 3)
        for slot in requests.host:
            request = requests.runner.canvas.requests[slot]
            request.first_end = request.prompt_len - request.prompt_len % 4 + 4
        for reaches in ([16, 12, 12], [32, 44, 24], [304, 44, 40], [304, 44, 40]):
            step = requests.runner.open(requests.slots, requests.host, reaches=reaches)
            requests.runner.place(step, Pages(requests.table, PAGE))
            positions, input_ids = step.packed()
            assert step.layout is not None
            hidden = requests.network.hidden(input_ids, positions, step.layout, step.hooks)
            if step.rows is not None:
                requests.runner.close(step, hidden[step.rows.logits_rows], requests.network.logits)
    assert len({kernel for kernel, _ in used}) > 8
    assert not used - known, sorted(used - known)


def test_a_kernel_that_was_left_out_is_noticed(
    known: frozenset[tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted fault: the warm-up has asked for no draws."""
    kinds = module._kinds
    monkeypatch.setattr(module, "_kinds", lambda worker: [kind for kind in kinds(worker) if kind[1] == SamplingSpec()])
    with launched() as fewer:
        warm_up(place_of(batch_of(Setting(({},)), 2)))
    assert {kernel for kernel, _ in known - fewer} >= {"_sampling_kernel"}


@pytest.mark.vllm
@pytest.mark.engine
@pytest.mark.skipif("torch.cuda.is_available()", reason="vLLM's own kernels must run on a GPU")
def test_an_engine_launches_nothing_that_its_start_has_not(tmp_path: Path) -> None:
    from tests.e2e.conftest import Engine, runner_of
    from tests.triton.test_engine_graphs import REQUESTS, generate

    size = {"max_num_seqs": 2, "max_model_len": 128, "num_gpu_blocks_override": 12, "block_size": 32}
    engine = Engine(tmp_path, **size)
    try:
        state = runner_of(engine).model_state
        with launched() as known, torch.inference_mode():
            state._get_ready()
        with launched() as used:
            generate(engine, REQUESTS)
        assert {name for name, _ in used} >= {"_rotate_kernel", "_attention_kernel", "_stats_kernel", "_refresh_kernel"}
        assert not used - known, sorted(used - known)
    finally:
        engine.close()
