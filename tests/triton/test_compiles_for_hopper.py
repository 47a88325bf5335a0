"""Every kernel compiles for an H100 at the shapes of real models, within what a block of a GPU has; in bf16 for others.

``make kernels`` runs this without Triton's interpreter, on any machine: the compiler and NVIDIA's assembler come with
Triton. It is what can be known of a kernel before it meets a GPU, beside its numbers in the interpreter.
"""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.count.grid import grids
from tests.triton.hopper import ARCHITECTURES, TARGETS, Launch, launches
from tests.triton.model_kernels import MODELS, every_kernel, row_params
from tests.triton.paged import Shape, make_batch
from tests.triton.step_launches import KERNELS, step_kernels
from vllm_d2cache.ops.rollout import LayerRecord
from vllm_d2cache.ops.row_stats import RowParams
from vllm_d2cache.ops.triton import attention, density, packing, pages, rollout, row_filter, row_stats

CPU = torch.device("cpu")
WRITTEN = json.loads((Path(__file__).parents[2] / "benchmarks" / "results" / "grid.json").read_text())["grids"]
SHAPES = [
    Shape(32, 32, 128, 16, torch.bfloat16),  # LLaDA-8B
    Shape(28, 4, 128, 16, torch.bfloat16),  # Dream-7B
    Shape(32, 32, 128, 16, torch.float16),
    Shape(32, 32, 128, 16, torch.float32),
    Shape(8, 2, 96, 64, torch.bfloat16),
    Shape(8, 8, 64, 16, torch.float16),
]
# What one block may have on every card from Ampere on; an H100 gives 227 KiB.
SHARED_MEMORY = 99 << 10
# Of a thread's local memory. Registers that do not fit go there: a few words are nothing, a tile's sums are a disaster.
LOCAL_MEMORY = 64

# Kernels of a layer whatever the batch, and those that a small batch has beside them, to fill the card.
LAYER = {"_write_kernel", "_count_kernel", "_attention_kernel", "_map_kernel", "_map_product_kernel", "_replay_kernel"}
SMALL = {"_combine_kernel", "_map_sum_kernel"}
MATRIX_PRODUCTS = {"_attention_kernel", "_map_kernel", "_replay_kernel"}


def attention_step(counts: list[int], lengths: list[int], shape: Shape, parts: bool = False) -> list[Launch]:
    """One layer: pages, output, maps, rollout; the first request's map is computed again, the others' are kept.

    Args:
        parts: the first request attends to a part of its positions.
    """
    batch = make_batch(counts, lengths, shape, CPU)
    fresh = torch.empty(sum(counts), shape.kv_heads, shape.head_size, dtype=shape.dtype)
    kept = [False] + [True] * (len(counts) - 1)
    maps = batch.maps(kept, keep_lse=True)
    layout = batch.layout
    if parts:
        layout = replace(layout, keys=[torch.arange(3)] + [None] * (len(counts) - 1))
    layer = LayerRecord(maps, batch.query, batch.cache, 0.1)
    with launches() as found:
        pages.write_kv(batch.cache, fresh, fresh, layout.slots)
        attention.paged_attention(batch.query, batch.cache, layout, 0.1, torch.empty_like(batch.query), maps)
        rollout.batched_rollout(batch.positions, [layer], layout, [True] * len(counts), max(lengths), None)
    return found


def statistics(dtype: torch.dtype, params: RowParams, vocab: int) -> list[Launch]:
    """Margin and entropy too."""
    with launches() as found:
        row_stats.tile_stats(torch.empty(len(params.draw), vocab, dtype=dtype), params, 7, True, True)
    return found


def check_resources(launch: Launch) -> None:
    assert launch.shared_memory <= SHARED_MEMORY, launch.name
    assert launch.local_memory <= LOCAL_MEMORY, launch.name
    assert launch.grid[0] < 1 << 31 and all(n < 1 << 16 for n in launch.grid[1:]), launch.name


@pytest.mark.parametrize("shape", SHAPES[:4], ids=str)
def test_attention_of_rows_that_end_at_different_keys(shape: Shape) -> None:
    batch = make_batch([33, 40, 5], [40, 400, 20], shape, CPU)
    layout = replace(batch.layout, limits=torch.ones(78, dtype=torch.int32))
    with launches() as found:
        attention.paged_attention(batch.query, batch.cache, layout, 0.1, batch.query.clone(), batch.maps([False] * 3))
    assert {launch.name for launch in found} == {"_attention_kernel", "_combine_kernel", "_count_kernel"}
    for launch in found:
        check_resources(launch)


@pytest.mark.parametrize("parts", [False, True], ids=["all-keys", "some-keys"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attention_maps_and_rollout(shape: Shape, parts: bool) -> None:
    found = attention_step([33, 40, 5], [40, 400, 20], shape, parts)
    assert {launch.name for launch in found} == LAYER | SMALL
    for launch in found:
        check_resources(launch)
        if launch.name in MATRIX_PRODUCTS:
            # 16-bit products run on tensor cores; in fp32 those would round the operands.
            assert ("mma" in launch.kernel.asm["ptx"]) == (shape.dtype != torch.float32), launch.name


@pytest.mark.parametrize("vocab", [126_464, 152_064], ids=["llada", "dream"])
@pytest.mark.parametrize("samples", [False, True])
@pytest.mark.parametrize("filters", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_row_statistics(dtype: torch.dtype, filters: bool, samples: bool, vocab: int) -> None:
    (launch,) = statistics(dtype, row_params(2, samples, filters), vocab)
    check_resources(launch)


def test_filters() -> None:
    whole = torch.zeros(2, dtype=torch.int64)
    with launches() as found:
        row_filter.filter_logits(torch.empty(2, 152_064), torch.ones(2), whole, 7)
    (launch,) = found
    check_resources(launch)


def test_density() -> None:
    with launches() as found:
        density.certainty_density(torch.zeros(3, 256, dtype=torch.bool), torch.full((3,), 256), torch.full((3,), 10.0))
    (launch,) = found
    check_resources(launch)


def test_packing() -> None:
    marked, places = torch.zeros(3, 1024, dtype=torch.bool), torch.full((3,), 40)
    with launches() as found:
        packing.pack_columns(marked, places.cumsum(0) - 40, places, 120)
    (launch,) = found
    check_resources(launch)


def test_no_kernel_is_compiled_again_for_another_batch() -> None:
    """Counts, lengths and the number of requests differ in every step; a compilation takes seconds of a request."""
    compiled = defaultdict(set)
    small = [([33], [40]), ([1, 16], [16, 17]), ([16, 5] * 8, [160, 16] * 8), ([2, 3, 4], [63, 64, 1025])]
    large = [([300, 301], [2048, 2049]), ([64] * 9, [4000] * 9)]
    for counts, lengths in small + large:
        for launch in attention_step(counts, lengths, SHAPES[0]):
            compiled[launch.name].add(launch.kernel.hash)
    for rows in (1, 2, 16, 33):
        (launch,) = statistics(torch.bfloat16, row_params(rows, True, True), 126_464)
        compiled[launch.name].add(launch.kernel.hash)
        for width in (1, 16, 33):
            flags, ones = torch.zeros(rows, width, dtype=torch.bool), torch.ones(rows)
            with launches() as found:
                density.certainty_density(flags, ones.long(), ones)
                places = torch.ones(rows, dtype=torch.int64)
                packing.pack_columns(flags, places.cumsum(0) - 1, places, rows)
            for launch in found:
                compiled[launch.name].add(launch.kernel.hash)
    # Attention and maps with a program for each part of the keys or heads, and with one for all of them; pieces of both
    # and of the rollout are counted.
    twice, pieces = ["_attention_kernel", "_map_kernel"], {"_count_kernel": 5}
    once = (LAYER | SMALL | {"_stats_kernel", "_density_kernel", "_pack_kernel"}) - {*twice, *pieces}
    found_hashes = {name: len(hashes) for name, hashes in compiled.items()}
    assert found_hashes == dict.fromkeys(once, 1) | dict.fromkeys(twice, 2) | pieces


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("model", MODELS)
def test_no_register_spills_in_bf16(model: str, architecture: int) -> None:
    """On any card from Ampere on; and what was compiled is for that card."""
    found = every_kernel(MODELS[model], TARGETS[architecture])
    others = {"_rotate_kernel", "_stats_kernel", "_filter_kernel", "_density_kernel", "_shift_kernel", "_pack_kernel"}
    assert {launch.name for launch in found} == LAYER | SMALL | others
    assert {launch.architecture for launch in found} == {architecture}
    for launch in found:
        assert launch.local_memory == 0, launch.name
        assert launch.shared_memory <= SHARED_MEMORY, launch.name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_kernels_outside_the_layers_spill_nothing(architecture: int) -> None:
    found = step_kernels(target=TARGETS[architecture])
    assert {launch.name for launch in found} == KERNELS
    for launch in {launch.kernel.hash: launch for launch in found}.values():
        assert launch.architecture == architecture
        assert launch.local_memory == 0, launch.name
        assert launch.shared_memory <= SHARED_MEMORY, launch.name


def test_no_kernel_outside_the_layers_is_compiled_again_for_another_batch() -> None:
    first = {launch.kernel.hash for launch in step_kernels()}
    for rows, prompt, canvas in ((1, 1, 1), (2, 15, 16), (8, 33, 33), (4, 1024, 1024)):
        for launch in step_kernels(rows, prompt, canvas):
            assert launch.kernel.hash in first, launch.name


@pytest.mark.parametrize("line", WRITTEN, ids=lambda line: f"{line['model']}-{line['length']}")
def test_programs_are_as_many_as_written_down(line: dict[str, Any]) -> None:
    """benchmarks/results/grid.json is what the kernels' wrappers do."""
    found = grids(MODELS[line["model"]], line["length"])
    assert found == {kernel: line[kernel] for kernel in found}
