"""Networks loaded by vLLM's own loader, without an engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from vllm_d2cache.models.families import FAMILIES


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., torch.nn.Module]]:
    """Loads a checkpoint's directory as a worker does; keyword arguments are those of vLLM's EngineArgs."""
    from vllm.config import set_current_vllm_config
    from vllm.distributed import (
        cleanup_dist_env_and_memory,
        init_distributed_environment,
        initialize_model_parallel,
    )
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader import get_model

    # vLLM's CPU worker takes care of this; the loader alone would ask for an accelerator.
    monkeypatch.setattr(torch.accelerator, "empty_cache", lambda: None)
    # The families whose attention the engine does not have are refused: what is tried here is their network.
    networks = {name: replace(family, unserved=None) for name, family in FAMILIES.items()}
    monkeypatch.setattr("vllm_d2cache.config_hook.FAMILIES", networks)

    def loaded(directory: Path, **options: Any) -> torch.nn.Module:
        arguments = {"skip_tokenizer_init": True, "max_model_len": 256, **options}
        config = EngineArgs(str(directory), **arguments).create_engine_config()
        with set_current_vllm_config(config):
            init_distributed_environment(1, 0, f"file://{tmp_path}/rendezvous", 0, backend="gloo")
            initialize_model_parallel(1, 1)
            model = get_model(vllm_config=config)
            model.vllm_config = config
            return model

    yield loaded
    cleanup_dist_env_and_memory()
