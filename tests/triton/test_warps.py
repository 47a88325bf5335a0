"""The kernels of a step by warps: the tests of the interpreter once more, on what the compiler made of the kernels."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from tests.triton import test_canvas_columns as canvas_columns
from tests.triton import test_density as density
from tests.triton import test_packing as packing
from tests.triton import test_rotary as rotary
from tests.triton import test_row_filter as row_filter
from tests.triton import test_row_stats as row_stats
from tests.triton import test_step_kernels as step
from tests.triton.paged import Shape, make_batch
from tests.triton.ptx.machine import Order
from tests.triton.ptx.run import Race, warps
from vllm_d2cache.ops.paged_attention import write_kv
from vllm_d2cache.ops.triton import pages
from vllm_d2cache.ops.triton.work import pieces

CPU = torch.device("cpu")
# Slot, prompt and canvas of each request, as in test_step_kernels: more columns than a warp has lanes, and than a
# kernel's stretch.
TEXTS = [[(4, 60, 150), (0, 3, 70), (2, 40, 1)], [(5, 1100, 1300), (1, 7, 40)]]
texts = pytest.mark.parametrize("places", TEXTS, ids=["short", "long"])


@triton.jit
def _counting_kernel(numbers, out, WAITS: tl.constexpr):
    number = tl.load(numbers)
    if WAITS:
        tl.debug_barrier()
    tl.store(numbers, number + 1)
    tl.store(out + tl.arange(0, 128), tl.zeros((128,), tl.int64) + number)


def count(waits: bool) -> tuple[torch.Tensor, torch.Tensor]:
    numbers, out = torch.tensor([5]), torch.zeros(128, dtype=torch.int64)
    _counting_kernel[(1,)](numbers, out, WAITS=waits)
    return numbers, out


def test_a_number_that_some_warps_read_late_is_noticed() -> None:
    with warps() as ran:
        numbers, out = count(True)
        assert (numbers.tolist(), set(out.tolist())) == ([6], {5})
        with pytest.raises(Race, match="_counting_kernel: out"):
            count(False)
    assert ran == {"_counting_kernel"}


@texts
@pytest.mark.parametrize("block", [None, 8], ids=["whole", "in-blocks"])
def test_texts(places: list[tuple[int, int, int]], block: int | None) -> None:
    with warps() as ran:
        step.test_texts_are_read(places, 0, block, CPU)
        for edits in ("commits", "revokes", "revises"):
            step.test_commits_are_written(places, 0, edits, block, CPU)
    assert ran == {"_read_kernel", "_commit_kernel"}


@texts
def test_tokens_are_handed_out(places: list[tuple[int, int, int]]) -> None:
    with warps() as ran:
        for keeps in ("all", "open", "held"):
            step.test_tokens_are_handed_out(places, 0, keeps, CPU)
    assert ran == {"_emit_kernel"}


@texts
@pytest.mark.parametrize("ordered", [False, True])
def test_rows(places: list[tuple[int, int, int]], ordered: bool) -> None:
    with warps() as ran:
        step.test_rows_are_chosen_and_packed(places, 0, 1, ordered, CPU)
    assert ran == {"_choose_kernel", "_pack_kernel", "_page_slots_kernel", "_spread_kernel"}


@texts
def test_plans(places: list[tuple[int, int, int]]) -> None:
    with warps() as ran:
        for observes, chosen in ((False, False), (True, False), (True, True)):
            step.test_plans_are_kept(places, observes, chosen, CPU)
    assert ran == {"_store_kernel"}


@texts
def test_sampling_of_rows(places: list[tuple[int, int, int]]) -> None:
    with warps() as ran:
        for draws in (False, True):
            step.test_rows_are_sampled_with(places, draws, CPU)
    assert ran == {"_sampling_kernel"}


@texts
def test_commits(places: list[tuple[int, int, int]]) -> None:
    with warps() as ran:
        step.test_commits_are_chosen(places, 0, (0.9, 0.3), CPU)
    assert ran == {"_choose_kernel"}


@texts
def test_commits_by_entropy(places: list[tuple[int, int, int]]) -> None:
    with warps() as ran:
        step.test_commits_are_chosen_by_entropy(places, 0, 0.4, CPU)
    assert ran == {"_entropy_kernel"}


@texts
def test_stage_one(places: list[tuple[int, int, int]]) -> None:
    with warps() as ran:
        step.test_stage_one(places, 0, 4, CPU)
    assert ran == {"_masked_kernel"}


@texts
@pytest.mark.parametrize("equal", [False, True], ids=["any", "equal"])
def test_stage_two(places: list[tuple[int, int, int]], equal: bool) -> None:
    with warps() as ran:
        step.test_stage_two(places, 0, 1, 0.6, equal, CPU)
    assert ran == {"_refresh_kernel"}


def test_columns() -> None:
    with warps() as ran:
        canvas_columns.test_slots_to_positions(torch.float32, 1, CPU)
        canvas_columns.test_slots_to_positions(torch.bool, 0, CPU)
        canvas_columns.test_positions_to_slots(1, CPU)
        density.test_ragged_rows_of_any_width(CPU)
        packing.test_places_to_spare_and_none_to_spare((2, 1025), 0.4, CPU)
        packing.test_lines_with_more_columns_than_places_do_not_write_into_the_next(CPU)
    assert ran == {"_shift_kernel", "_density_kernel", "_pack_kernel"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_pages(dtype: torch.dtype) -> None:
    fresh, slots = torch.randn(2, 5, 3, 96).to(dtype), torch.tensor([7, -1, 0, 40, 18])
    caches = torch.zeros(2, 3, 3, 16, 192, dtype=dtype).transpose(1, 2)
    with warps() as ran:
        pages.write_kv(caches[0], *fresh, slots)
    write_kv.__wrapped__(caches[1], *fresh, slots)
    assert ran == {"_write_kernel"}
    assert torch.equal(caches[0], caches[1])


@pytest.mark.parametrize(("shape", "dim"), rotary.SHAPES, ids=str)
def test_rotation(shape: Shape, dim: int) -> None:
    with warps() as ran:
        rotary.test_rotation_and_pages(shape, dim, True, CPU)
        rotary.test_rotation_and_pages(shape, dim, False, CPU)
    assert ran == {"_rotate_kernel"}


def test_pieces_of_more_requests_than_a_stretch() -> None:
    counts = [1 + 7 * i % 40 for i in range(150)]
    layout = make_batch(counts, [n + 5 for n in counts], Shape(1, 1, 16), CPU).layout
    with warps() as ran:
        starts = pieces(layout, 16, 32).starts
    assert ran == {"_count_kernel"}
    want = [-(-n // 16) * -(-(n + 5) // 32) for n in counts]
    assert starts.tolist() == [sum(want[:i]) for i in range(151)]


def test_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_stats.kernels, "BLOCK", 128)
    with warps() as ran:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            row_stats.test_greedy(row_stats.VOCAB, dtype, CPU)
        for temperature, top_p, top_k in ((0.7, 1.0, 0), (0.0, 0.9, 20), (0.7, 0.3, 0), (0.7, 0.9, 20)):
            row_stats.test_sampling_and_filters(temperature, top_p, top_k, CPU)
        row_stats.test_ties_go_to_the_lower_token(CPU)
    assert ran == {"_stats_kernel"}


def test_filters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_filter.kernels, "BLOCK", 128)
    with warps() as ran:
        for top_p, top_k in row_filter.SETTINGS:
            row_filter.test_what_is_kept(top_p, top_k, CPU)
        row_filter.test_rows_without_a_filter_stay_as_they_are(CPU)
        row_filter.test_the_second_is_kept_where_the_mask_leads(CPU)
        row_filter.test_ties_go_to_the_lower_token(CPU)
    assert ran == {"_filter_kernel"}


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize(("top_p", "top_k"), [(1.0, 0), (0.9, 0), (0.7, 40)])
def test_statistics_do_not_go_by_what_mates_ask_for(top_p: float, top_k: int, temperature: float) -> None:
    """Beside a mate whose logits are edited they are fp32, at their temperature and filtered, before they are read.

    Threads then hold other lanes, and would add up in another order.
    """
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(6, 3 * 4096 + 512, generator=generator)).bfloat16()
    logits[:, 5] += torch.tensor([0.0, 4.0, 8.0, 12.0, 16.0, 20.0])
    params = row_stats.make_params(6, CPU, temperature, top_p, top_k)
    scaled = logits.float() / (temperature or 1.0)
    with warps(Order.FORWARDS):
        if params.filters:
            row_filter.kernels.filter_logits(scaled, params.top_p, params.top_k, 7)
        found = [
            row_stats.kernels.tile_stats(given, params, 7, True, True, ready)
            for given, ready in ((logits, False), (scaled, True))
        ]
    for name in ("token", "confidence", "margin", "entropy"):
        assert torch.equal(*(getattr(stats, name) for stats in found)), name
