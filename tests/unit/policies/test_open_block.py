"""Policies where texts are cut into blocks: all of the open block, or a part of it until it is stored whole."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.reference.blocks import BLOCK_ORACLE, BlockModel
from tests.reference.d2cache_blocks import D2CacheBlocks
from tests.unit.blocks import SHIFTED, BlockJob, run
from tests.unit.models.test_block_oracle import MODELS
from vllm_d2cache.options.sampling import SamplingSpec
from vllm_d2cache.options.server import ServerOptions
from vllm_d2cache.options.types import OptionError
from vllm_d2cache.policies.budget import row_budget
from vllm_d2cache.requests.resolve import resolve

SAMPLED = SamplingSpec(0.9, 0.95, 40, 7)
ALL = [("sdar", 4), ("sdar", 8), ("llada2", 8), ("llada2", 32), ("sdar_moe", 4), ("fast_dllm_v2", 8)]


def model_of(family: str) -> BlockModel:
    return MODELS[family](BLOCK_ORACLE / family)


def jobs_of(family: str, length: int, **options: Any) -> list[BlockJob]:
    """Prompts that end within a block and with one, greedy and sampled."""
    rng, made = random.Random(length), []
    for n, size in enumerate((3, 2 * length, 3 * length + 2)):
        prompt = [rng.randrange(360) for _ in range(size)]
        sampling = SAMPLED if n == 1 else SamplingSpec()
        asked = {"threshold": 0.3, **options}
        made.append(BlockJob(prompt, 2 * length + 3, length, asked, sampling, int(family in SHIFTED)))
    return made


def both(job: BlockJob, model: BlockModel, **options: Any) -> tuple[BlockJob, BlockJob]:
    """The same request by policy ``block`` and by another."""
    other = replace(job, options={**job.options, **options}, steps=[], output=[])
    return run(replace(job, options={**job.options, "policy": "block"}, steps=[], output=[]), model), run(other, model)


@pytest.mark.parametrize(("family", "length"), ALL)
@pytest.mark.parametrize(
    "options", [{"policy": "full"}, {"policy": "d2cache", "current_k": 32}], ids=lambda o: o["policy"]
)
def test_a_whole_block_is_the_same_computation(family: str, length: int, options: dict[str, Any]) -> None:
    """Rows, tokens and the last bit of each confidence."""
    for job in jobs_of(family, length):
        for asked in ({}, {"decoder": "edit", "editing_threshold": 0.2}) if family not in SHIFTED else ({},):
            plain, other = both(replace(job, options={**job.options, **asked}), model_of(family), **options)
            assert plain.output == other.output
            assert plain.steps == other.steps


@pytest.mark.parametrize(("family", "length"), ALL)
@pytest.mark.parametrize(
    "options",
    [
        {"current_k": 2, "selection_sigma": 0, "inflate_w": 0, "threshold": 0},
        {"current_k": 3, "selection_sigma": 2.0, "inflate_w": 2, "threshold": 0.8},
        {"current_k": 3, "selection_sigma": 10.0, "inflate_w": 0, "threshold": 0.7, "latest": 1},
        {"current_k": 3, "selection_sigma": 2.0, "inflate_w": 1, "threshold": 0.5, "parts": 2},
        {"current_k": 3, "selection_sigma": 0, "inflate_w": 0, "threshold": 0, "parts": 4, "latest": 1},
    ],
    ids=["best", "dense", "latest", "halves", "quarters"],
)
def test_a_part_of_a_block_is_that_of_the_plain_loop(family: str, length: int, options: dict[str, float]) -> None:
    """Also where a block has several windows, and where a slot is read left of its position."""
    partial = 0
    own = {key: value for key, value in options.items() if key not in ("latest", "parts")}
    window = length // int(options["parts"]) if "parts" in options else 0
    for job in jobs_of(family, length):
        asked = {**own, "policy": "d2cache", "window": window}
        asked |= {"confidence_memory": "latest" if "latest" in options else "first"}
        job = replace(job, options=asked, sampling=SamplingSpec(), steps=[], output=[])
        got = run(job, model_of(family))
        twin = D2CacheBlocks(
            model_of(family), list(job.prompt), job.max_tokens, length, window=window, shift=job.shift, **options
        )
        wanted = list(twin.steps())
        for step, want in zip(got.steps, wanted, strict=True):
            assert step.rows == want.rows
            assert step.committed == want.committed
            judged = {p: c for p, (_, c) in step.predicted.items()}
            assert judged == pytest.approx({p: want.confidence[p] for p in judged}, abs=1e-5)
            if "latest" in options:  # the memory takes all of them
                assert judged.keys() == want.confidence.keys()
            partial += len(want.rows) < length
        assert got.output == twin.tokens[twin.prompt : twin.stop]
    assert partial > 1 or length == 4, "or nothing has been left out"


@pytest.mark.parametrize(("family", "length"), ALL)
@pytest.mark.parametrize("decoder", ["confidence", "edit"])
def test_no_error_leaves_its_block(family: str, length: int, decoder: str) -> None:
    """What is stored of finished blocks is what their final tokens give, whatever was left out inside them."""
    if decoder == "edit" and family in SHIFTED:
        return  # its sub-blocks are not edited
    for job in jobs_of(family, length, decoder=decoder, policy="d2cache", current_k=1, inflate_w=0, threshold=0.9):
        model = model_of(family)
        job = run(job, model)
        text = [*job.prompt, *job.output]
        whole = len(text) // length * length
        stored = [
            (k[: whole - length].clone(), v[: whole - length].clone())
            for k, v in zip(model.keys, model.values, strict=True)
        ]
        model.reset(whole)
        model.store(text[: whole - length], 0, length)
        for (keys, values), fresh_keys, fresh_values in zip(stored, model.keys, model.values, strict=True):
            assert torch.allclose(keys, fresh_keys[: whole - length], atol=1e-5)
            assert torch.allclose(values, fresh_values[: whole - length], atol=1e-5)
        assert any(len(step.rows) < length for step in job.steps)


def test_bounds_and_what_has_no_meaning() -> None:
    server = ServerOptions({"policy": "block"}, block_length=32)
    options = resolve(server, {"policy": "d2cache", "threshold": 0.9})
    assert options.policy_options["current_k"] == 8, "a quarter of a block, not of a canvas"
    assert row_budget(options, 1000, 500, None) == 64
    assert row_budget(resolve(server, {"policy": "full"}), 1000, 500, None) == 64
    assert (options.window, options.sigma) == (0, 0.0), "the decoding of the family"
    with pytest.raises(OptionError, match=r"d2cache_rollout_p: has no meaning with this model.*d2cache_current_k"):
        resolve(server, {"policy": "d2cache", "rollout_p": 0.5})
    resolve(server, {"policy": "full", "rollout_p": 0.5, "block_cache": "on"})  # reads none, as everywhere
    with pytest.raises(OptionError, match="d2cache_policy: must be 'd2cache' or 'full' or 'block' with this model"):
        resolve(server, {"policy": "dkv"})
    for policy in ("block", "full", "d2cache"):
        with pytest.raises(OptionError, match=f"d2cache_decoder: 'wino' does not go with d2cache_policy '{policy}'"):
            resolve(server, {"policy": policy, "decoder": "wino"})
