"""Checkpoints in every shape the published layout allows, and errors that name what is wrong.

Runs after test_variants.py has closed the shared engine: each test starts one of its own.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.e2e.conftest import Engine, assert_same
from tests.reference.llada import DenseLlada
from tests.reference.loop import Job, run_jobs
from tests.reference.oracle import ORACLE, load_case

pytestmark = [pytest.mark.vllm, pytest.mark.engine]

Tensors = dict[str, torch.Tensor]


def write_checkpoint(
    directory: Path, change: Callable[[dict[str, Any], Tensors], None], shards: int = 1
) -> tuple[dict[str, Any], Tensors]:
    """The traces' checkpoint with ``change`` applied to its config and tensors."""
    config = json.loads((ORACLE / "llada" / "config.json").read_text())
    tensors = load_file(ORACLE / "llada" / "model.safetensors")
    change(config, tensors)
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    names = sorted(tensors)
    if shards == 1:
        save_file(tensors, directory / "model.safetensors")
    else:
        index = {}
        for i in range(shards):
            file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
            part = {name: tensors[name].contiguous() for name in names[i::shards]}
            save_file(part, directory / file)
            index |= dict.fromkeys(part, file)
        (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return config, tensors


def test_sharded_with_auto_map_null_kv_heads_and_padded_embedding(tmp_path: Path) -> None:
    def change(config: dict[str, Any], tensors: Tensors) -> None:
        config["n_kv_heads"] = None
        config["embedding_size"] = 448
        config["auto_map"] = {"AutoConfig": "configuration_llada.LLaDAConfig"}
        for name in ("model.transformer.wte.weight", "model.transformer.ff_out.weight"):
            # Padding rows that would win every argmax if they were looked at.
            tensors[name] = torch.cat([tensors[name], torch.full((64, tensors[name].shape[1]), 50.0)])

    write_checkpoint(tmp_path / "model", change, shards=3)
    case = load_case("llada.d2fixmask_default")
    engine = Engine(tmp_path, model=str(tmp_path / "model"))
    try:
        ((tokens, _),) = engine.run([{"prompt": case.prompt, "max_tokens": 32, "options": case.options}])
    finally:
        engine.close()
    assert tokens == case.final_tokens


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tied_weights_and_grouped_queries(tmp_path: Path, dtype: str) -> None:
    def change(config: dict[str, Any], tensors: Tensors) -> None:
        config["weight_tying"] = True
        config["n_kv_heads"] = 2
        del tensors["model.transformer.ff_out.weight"]
        for name in list(tensors):
            if ".k_proj." in name or ".v_proj." in name:
                tensors[name] = tensors[name][:32].contiguous()

    write_checkpoint(tmp_path / "model", change)
    prompts = [list(range(1, 30)), [7, 8, 9]]
    engine = Engine(tmp_path, model=str(tmp_path / "model"), dtype=dtype)
    try:
        got = engine.run([{"prompt": p, "max_tokens": 24} for p in prompts])
        alone = [engine.run([{"prompt": p, "max_tokens": 24}])[0] for p in prompts]
    finally:
        engine.close()
    assert_same(got, alone)
    if dtype == "float32":
        for prompt, (tokens, _) in zip(prompts, got, strict=True):
            job = Job(prompt, 24, {})
            run_jobs([DenseLlada(tmp_path / "model")], [job])
            assert tokens == job.output


def _drop(name: str) -> Callable[[dict[str, Any], Tensors], None]:
    return lambda config, tensors: tensors.pop(name)


def _add(name: str) -> Callable[[dict[str, Any], Tensors], None]:
    return lambda config, tensors: tensors.update({name: torch.zeros(4)})


def _damage(name: str) -> Callable[[dict[str, Any], Tensors], None]:
    return lambda config, tensors: tensors[name].view(-1)[3:4].fill_(torch.nan)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (_drop("model.transformer.blocks.2.k_proj.weight"), "blocks.2.k_proj.weight"),
        (_add("model.transformer.blocks.1.q_norm.weight"), "q_norm"),
        (_damage("model.transformer.blocks.1.attn_norm.weight"), r"damaged: 1 of .*blocks\.1\.attn_norm\.weight"),
        (_damage("model.transformer.blocks.1.up_proj.weight"), r"damaged: 1 of .*blocks\.1\.up_proj\.weight"),
    ],
    ids=["missing", "unknown", "damaged norm", "damaged linear layer"],
)
def test_wrong_tensors_are_named(tmp_path: Path, change: Any, named: str) -> None:
    from vllm.distributed import cleanup_dist_env_and_memory

    write_checkpoint(tmp_path / "model", change)
    with pytest.raises(ValueError, match=named):
        Engine(tmp_path, model=str(tmp_path / "model"))
    cleanup_dist_env_and_memory()


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"additional_config": {"d2cache": {"windw": 3}}}, "windw"),
        ({"additional_config": {"d2cache": {"rollout_p": 2}}}, "rollout_p"),
        ({"pipeline_parallel_size": 2}, "pipeline-parallel-size"),
        ({"kv_cache_dtype": "fp8"}, "kv-cache-dtype"),
    ],
    ids=["unknown-option", "option-range", "pipeline", "kv-dtype"],
)
def test_start_up_refuses_by_name(tmp_path: Path, settings: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        Engine(tmp_path, **settings)


@pytest.mark.parametrize("key", ["alibi", "include_bias", "attention_layer_norm"])
def test_other_variants_of_the_architecture_are_refused(tmp_path: Path, key: str) -> None:
    write_checkpoint(tmp_path / "model", lambda config, tensors: config.update({key: True}))
    with pytest.raises(ValueError, match=f"{key}=True"):
        Engine(tmp_path, model=str(tmp_path / "model"))
