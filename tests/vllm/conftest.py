"""vLLM's own loader without an engine, and both things that its layers do with their weights."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch

from vllm_d2cache.models.families import FAMILIES

# tools/test_cuda_wheels.py: vLLM's Python code for CPUs, and no compiled operators for them.
_WITHOUT_OPERATORS = os.environ.get("VLLM_TARGET_DEVICE") == "cpu" and "cpu" not in version("vllm")
_LACKING = re.compile(r"'_OpNamespace' '_C' object has no attribute '(\w+)'")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Iterator[None]:
    """Skip a test that comes to a compiled operator which this build of vLLM has not."""
    try:
        return (yield)
    except AttributeError as error:
        lacking = _LACKING.search(str(error))
        if not _WITHOUT_OPERATORS or lacking is None:
            raise
        pytest.skip(f"vLLM's CUDA build has no operator {lacking[1]} for CPUs")


def numbers(tensors: list[torch.Tensor]) -> torch.Tensor:
    """All elements, sorted."""
    return torch.cat([t.flatten().float() for t in tensors]).sort().values


@dataclass(frozen=True)
class Loaded:
    """A model as vLLM's loader leaves it.

    Attributes:
        config: vLLM's, of an engine with this model.
        dtypes: of its parameters, by name.
        numbers: all elements of all parameters, sorted, as they were before vLLM's layers took them over: what becomes
            of a parameter then (packed and emptied, or as it was) depends on the CPU.
    """

    model: torch.nn.Module
    config: Any
    dtypes: dict[str, torch.dtype]
    numbers: torch.Tensor


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the engine had the attention of all families: what is tried is their configuration, or their network."""
    families = {name: replace(family, unserved=None) for name, family in FAMILIES.items()}
    monkeypatch.setattr("vllm_d2cache.models.config_rules.FAMILIES", families)


@pytest.fixture
def load(tmp_path: Path, served: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Loaded]]:
    """Loads a model as a worker does: its directory, and settings of the engine."""
    from vllm.config import set_current_vllm_config
    from vllm.distributed import cleanup_dist_env_and_memory, init_distributed_environment, initialize_model_parallel
    from vllm.distributed.parallel_state import model_parallel_is_initialized
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader import base_loader, get_model, utils

    # vLLM's CPU worker takes care of this; the loader alone would ask for an accelerator.
    monkeypatch.setattr(torch.accelerator, "empty_cache", lambda: None)
    found: list[tuple[dict[str, torch.dtype], torch.Tensor]] = []
    process = base_loader.process_weights_after_loading

    def look_first(model: torch.nn.Module, config: Any, *args: Any, **kwargs: Any) -> None:
        if hasattr(utils, "maybe_retie_word_embeddings"):  # vLLM 0.32; would come next
            utils.maybe_retie_word_embeddings(model, config)
        parameters = dict(model.named_parameters())
        found.append(({name: p.dtype for name, p in parameters.items()}, numbers(list(parameters.values()))))
        process(model, config, *args, **kwargs)

    monkeypatch.setattr(base_loader, "process_weights_after_loading", look_first)

    def loaded(directory: Path, **settings: Any) -> Loaded:
        args = EngineArgs(str(directory), **{"skip_tokenizer_init": True, "max_model_len": 256, **settings})
        config = args.create_engine_config()
        with set_current_vllm_config(config):
            if not model_parallel_is_initialized():
                init_distributed_environment(1, 0, f"file://{tmp_path}/rendezvous", 0, backend="gloo")
                initialize_model_parallel(1, 1)
            model = get_model(vllm_config=config)
        return Loaded(model, config, *found.pop())

    yield loaded
    cleanup_dist_env_and_memory()


@pytest.fixture(params=["packed", "plain"])
def linear_layers(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What vLLM does with a linear layer, by CPU: packs its weight and empties the parameter, or leaves it alone."""
    from vllm.model_executor.layers import utils

    def take_over(layer: torch.nn.Module, remove_weight: bool) -> None:
        weight = layer.weight.data
        layer.cpu_linear = lambda x, _, bias: torch.nn.functional.linear(x, weight, bias)
        if request.param == "packed" and remove_weight:
            layer.weight = torch.nn.Parameter(weight.new_empty(0), requires_grad=False)

    assert hasattr(utils, "dispatch_cpu_unquantized_gemm"), "vLLM does this elsewhere: nothing would be tested"
    monkeypatch.setattr(utils, "dispatch_cpu_unquantized_gemm", take_over)
    return str(request.param)
