"""Attention and maps cut into more programs than rows give: the same bits, whoever does which part."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from tests.ops.live import LiveMemory
from tests.triton.conftest import INTERPRETED
from tests.triton.paged import Batch, Shape, make_batch, tolerance
from tests.triton.programs import busy_programs
from vllm_d2cache.ops import paged_attention as twin
from vllm_d2cache.ops.paged_attention import AttentionMaps, MapPlan, PagedLayout
from vllm_d2cache.ops.split import forced, parts_bytes
from vllm_d2cache.ops.triton import attention as kernels
from vllm_d2cache.ops.triton import maps, work

SHAPES = [Shape(2, 2, 32), Shape(7, 1, 16), Shape(10, 5, 16, 16, torch.bfloat16)]
# A stretch and one key more, a whole number of stretches, less than one; in one shape keys whose stretches are longer.
COUNTS, LENGTHS, LONG = [5, 1, 3, 2], [257, 512, 300, 40], [257, 512, 2305, 40]


def both(batch: Batch, split: bool | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Output, log-sum-exp and maps."""
    output = torch.full_like(batch.query, torch.nan)
    left = batch.maps([batch.layout.keys is None] * len(batch.layout.counts), keep_lse=True)
    assert left.lse is not None
    kernels.attend(batch.query, batch.cache, batch.layout, 0.3, output, left.lse, split=split)
    kernels.attention_maps(batch.query, batch.cache, batch.layout, 0.3, left.lse, left, split=split)
    return output, left.lse, left.memory


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_who_does_which_part_changes_no_bit(shape: Shape, device: torch.device) -> None:
    lengths = LONG if shape == SHAPES[1] else LENGTHS
    batch = make_batch(COUNTS, lengths, shape, device, padding=[1, 0, 0, 2])
    (out, lse, left), (split_out, split_lse, split_left) = both(batch, False), both(batch, True)
    assert torch.equal(out, split_out)
    assert torch.equal(lse[batch.live], split_lse[batch.live])
    assert torch.equal(left, split_left)
    want, want_maps = torch.empty_like(out[batch.live]), batch.maps([True] * 4, batch.dense)
    twin.paged_attention(batch.query[batch.live], batch.cache, batch.dense, 0.3, want, want_maps)
    torch.testing.assert_close(out[batch.live], want, **tolerance(shape.dtype))
    assert (out[~batch.live] == 0).all()
    assert out.isfinite().all()


def test_keys_of_a_part_are_split_too(device: torch.device) -> None:
    batch = make_batch([4, 3], [700, 300], SHAPES[0], device)
    keys = [torch.arange(0, 700, 2, device=device), torch.tensor([299], device=device)]
    batch.layout = batch.dense = replace(batch.layout, keys=keys)
    outs = [both(batch, split)[0] for split in (False, True)]
    assert torch.equal(*outs)
    want = torch.empty_like(outs[0])
    twin.paged_attention(batch.query, batch.cache, batch.layout, 0.3, want, [None, None])
    torch.testing.assert_close(outs[0], want, **tolerance(torch.float32))


def test_log_sum_exp_alone(device: torch.device) -> None:
    batch = make_batch([3, 2], [700, 300], SHAPES[1], device, padding=[1, 0])
    lse = [torch.full(batch.query.shape[:2], torch.nan, device=device) for _ in range(2)]
    for split, out in zip((False, True), lse, strict=True):
        kernels.attend(batch.query, batch.cache, batch.layout, 0.3, None, out, split=split)
    assert torch.equal(lse[0][batch.live], lse[1][batch.live])


def capacities(batch: Batch, rows: int, length: int) -> Batch:
    """The batch as a graph has it: what the host knows of it are capacities; rows to spare are nobody's."""
    layout, spare = batch.layout, rows - len(batch.query)
    starts = torch.cat([layout.row_starts, torch.tensor([rows], dtype=torch.int32, device=layout.slots.device)])
    lengths = torch.nn.functional.pad(layout.text_lengths, (0, 1))
    slots = torch.nn.functional.pad(layout.slots, (0, spare), value=-1)
    n = len(layout.counts) + 1
    table = torch.cat([layout.block_table, layout.block_table[:1]])
    graph = PagedLayout([0] * (n - 1) + [rows], [length] * n, table, [-1] * n, slots)
    graph.read_on_device(starts, lengths)
    query = torch.nn.functional.pad(batch.query, (0, 0, 0, 0, 0, spare), value=torch.nan)
    return replace(batch, query=query, layout=graph)


@pytest.mark.parametrize("resident", [1, 3, 1000])
def test_capacities_and_few_programs_change_no_bit(
    resident: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A program takes piece after piece; which ones is nobody's business."""
    batch = make_batch([3, 0, 2], [300, 40, 520], SHAPES[0], device, padding=[1, 0, 0])
    want = both(batch, True)[0]
    monkeypatch.setattr(work, "_resident", lambda device: resident)
    graph = capacities(batch, 8, 1024)
    output, lse = torch.full_like(graph.query, torch.nan), torch.empty(graph.query.shape[:2], device=device)
    kernels.attend(graph.query, graph.cache, graph.layout, 0.3, output, lse)
    assert torch.equal(output[:5], want)
    assert (output[5:] == 0).all()


def test_a_request_in_stretches_does_not_depend_on_its_mates(device: torch.device) -> None:
    """Bit for bit, in a batch that is split and in one that has rows enough."""
    batch = make_batch([4, 3], [600, 300], SHAPES[0], device)
    layout = PagedLayout([4], [600], batch.layout.block_table[:1], [-1], batch.layout.slots[:4])
    output, _, own = both(replace(batch, query=batch.query[:4], layout=layout), None)
    for cut in (True, False):
        with forced(cut):
            together, _, memory = both(batch, None)
        assert torch.equal(output, together[:4])
        assert torch.equal(own, memory[: own.numel()])


@pytest.mark.skipif(not INTERPRETED, reason="programs are counted in the interpreter")
def test_a_small_batch_has_work_for_many_programs() -> None:
    """A quarter of LLaDA-8B's heads, at 1,024 positions and 82 rows, in tiles of 16 bits."""
    shape = Shape(8, 8, 16, 16, torch.bfloat16)
    batch = make_batch([136], [1024], shape, torch.device("cpu"), padding=[54])
    with busy_programs() as busy:
        both(batch, None)
    assert busy["_attention_kernel"] == 8 * 3 * 4
    assert busy["_map_kernel"] == 2 * 3 * 16


class Unlaunched:
    """In place of a kernel."""

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *args, **kwargs: None


@pytest.mark.parametrize("heads", [(32, 32), (28, 4), (16, 16), (9, 3)])
def test_the_memory_plan_has_room_for_the_parts(heads: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    for module, names in ((kernels, ["_attention", "_combine"]), (maps, ["_map", "_map_sum"]), (work, ["_count"])):
        for name in names:
            monkeypatch.setattr(module, f"{name}_kernel", Unlaunched())
    largest = 0
    for rows in (30, 130, 255, 510):
        for length in (300, 2048, 4096):
            query = torch.empty(rows, heads[0], 128, dtype=torch.bfloat16)
            cache = torch.empty(1, heads[1], 16, 256, dtype=torch.bfloat16)
            table, slots = torch.zeros(1, 1, dtype=torch.int32), torch.zeros(rows, dtype=torch.int64)
            layout, plan = PagedLayout([rows], [length], table, [0], slots), MapPlan.pack([(rows, length)])
            left = AttentionMaps(plan, torch.empty(plan.elements), torch.empty(rows, heads[0]))
            output = torch.empty_like(query)
            with LiveMemory() as live:
                kernels.paged_attention(query, cache, layout, 0.1, output, left)
            largest = max(largest, live.peak)
    planned = parts_bytes(heads[0], 128, 4096)
    assert 0.2 * planned < largest <= planned + 4096, "and some numbers a request"
