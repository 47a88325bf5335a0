"""Each CPU twin against a scalar transcription of its Triton kernel's pointer arithmetic.

The references below follow the kernels program by program and element by element, on flat memory. vLLM itself
is not needed for them; that the twins still fit vLLM's kernels is test_cpu_runner.py's business.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from vllm_d2cache.compat import cpu_kernels as twins

pytestmark = pytest.mark.vllm

MAX_REQS = 11
BATCHES = [[], [1], [5], [1, 1], [3, 1, 7], [32] * 8, [1, 130, 2, 17, 1, 64, 9]]
SEEDS = range(4)
I32, I64 = torch.int32, torch.int64
Rng = np.random.Generator


def ints(rng: Rng, shape: int | tuple[int, ...], low: int, high: int, dtype: torch.dtype = I32) -> torch.Tensor:
    return torch.from_numpy(rng.integers(low, high, shape)).to(dtype)


def rows_of(rng: Rng, num_reqs: int) -> torch.Tensor:
    return torch.from_numpy(rng.permutation(MAX_REQS)[:num_reqs].astype(np.int64))


def starts_of(lengths: list[int], padding: int = 3) -> torch.Tensor:
    total = np.cumsum([0, *lengths])
    return torch.tensor([*total, *([total[-1]] * padding)], dtype=I32)


def pointers(tensors: list[torch.Tensor]) -> torch.Tensor:
    return torch.tensor([t.data_ptr() for t in tensors], dtype=torch.uint64)


def assert_same(reference: Callable[[SimpleNamespace], None], twin: Callable[..., None], args: dict[str, Any]) -> None:
    """Run both on their own copies and compare every tensor, written or not."""
    copies = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in args.items()}
    reference(SimpleNamespace(**copies))
    twin(**args)
    for name, value in args.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, copies[name]), name


def seq_lens_reference(a: SimpleNamespace) -> None:
    num_reqs = len(a.idx_mapping_ptr)
    for program in range(num_reqs + 1):
        if program == num_reqs:
            for i in range(num_reqs, a.max_num_reqs):
                a.seq_lens_ptr[i] = 0
            continue
        done = int(a.num_computed_tokens_ptr[a.idx_mapping_ptr[program]])
        start, end = (int(a.query_start_loc_ptr[program + i]) for i in (0, 1))
        a.seq_lens_ptr[program] = done + end - start


@pytest.mark.parametrize("lengths", BATCHES)
def test_seq_lens_of_batch(lengths: list[int]) -> None:
    rng = np.random.default_rng(0)
    args = {
        "seq_lens_ptr": ints(rng, MAX_REQS, 1, 9),
        "idx_mapping_ptr": rows_of(rng, len(lengths)),
        "query_start_loc_ptr": starts_of(lengths),
        "num_computed_tokens_ptr": ints(rng, MAX_REQS, 0, 500),
        "max_num_reqs": MAX_REQS,
    }
    assert_same(seq_lens_reference, twins.seq_lens_of_batch, args)


@pytest.mark.parametrize("num_logits", [0, 1, 5])
def test_logits_rows_exist(num_logits: int) -> None:
    """vLLM allocates them without a value."""
    rows = torch.full((num_logits,), 1 << 40)
    twins.any_logits_rows(logits_indices_ptr=rows, more=1)
    assert rows.tolist() == [0] * num_logits


def sampled_reference(a: SimpleNamespace) -> None:
    for program in range(len(a.idx_mapping_ptr)):
        chunked = int(a.seq_lens_ptr[program]) < int(a.prefill_len_ptr[a.idx_mapping_ptr[program]])
        sampled = 0 if chunked else int(a.num_sampled_ptr[program])
        a.num_sampled_ptr[program] = sampled
        num_logits = int(a.cu_num_logits_ptr[program + 1] - a.cu_num_logits_ptr[program])
        a.num_rejected_ptr[program] = 0 if chunked else num_logits - sampled


@pytest.mark.parametrize("num_reqs", [0, 1, 3, 8])
@pytest.mark.parametrize("seed", SEEDS)
def test_get_num_sampled_and_rejected(num_reqs: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    args = {
        "num_sampled_ptr": ints(rng, num_reqs, 0, 4),
        "num_rejected_ptr": ints(rng, num_reqs, -9, 0),
        "seq_lens_ptr": ints(rng, num_reqs, 5, 9),
        "cu_num_logits_ptr": starts_of(rng.integers(0, 6, num_reqs).tolist(), padding=0),
        "idx_mapping_ptr": rows_of(rng, num_reqs),
        "prefill_len_ptr": ints(rng, MAX_REQS, 5, 9),
    }
    assert_same(sampled_reference, twins.get_num_sampled_and_rejected, args)


@pytest.mark.parametrize("lengths", BATCHES)
@pytest.mark.parametrize("variant", ["plain", "no query", "skipped rows"])
def test_advance(lengths: list[int], variant: str) -> None:
    rng = np.random.default_rng(len(lengths))
    rows, starts = rows_of(rng, len(lengths)), starts_of(lengths)
    computed, rejected = ints(rng, MAX_REQS, 0, 99), ints(rng, len(lengths) + 2, 0, 3)
    if variant == "skipped rows":
        rows[::2] = -1
    expected = computed.clone()
    for program, length in enumerate(lengths):
        if rows[program] >= 0:
            expected[rows[program]] += (0 if variant == "no query" else length) - int(rejected[program])
    given = {"num_rejected_ptr": rejected, "query_start_loc_ptr": None if variant == "no query" else starts}
    twins.advance(rows, computed, **given, sampled_tokens_ptr=None)
    assert torch.equal(computed, expected)


@pytest.mark.parametrize("lengths", BATCHES)
def test_post_update_num_computed_tokens(lengths: list[int]) -> None:
    rng = np.random.default_rng(1)
    rows, starts = rows_of(rng, len(lengths)), starts_of(lengths)
    computed = ints(rng, MAX_REQS, 0, 99)
    expected = computed.clone()
    for program, length in enumerate(lengths):
        expected[rows[program]] += length
    twins.post_update_num_computed_tokens(rows, computed, starts)
    assert torch.equal(computed, expected)


@pytest.mark.parametrize("counts", [[], [0], [3], [0, 0], [1, 0, 4, 2], [32] * 8])
@pytest.mark.parametrize("dtype", [I32, I64])
def test_expand_idx_mapping(counts: list[int], dtype: torch.dtype) -> None:
    rng = np.random.default_rng(2)
    rows, bounds = rows_of(rng, len(counts)).to(dtype), starts_of(counts, padding=0)
    expanded, local = torch.full((sum(counts),), -1, dtype=dtype), torch.full((sum(counts),), -1, dtype=I32)
    twins.expand_idx_mapping(rows, expanded, local, bounds)
    assert expanded.tolist() == [int(rows[i]) for i, n in enumerate(counts) for _ in range(n)]
    assert local.tolist() == [i for n in counts for i in range(n)]


# --- staged writes and block tables: raw pointers -----------------------------------------------------------


@pytest.mark.parametrize("dtype", [I32, I64, torch.float32])
@pytest.mark.parametrize("shape", [(MAX_REQS, 40), (MAX_REQS,)])
@pytest.mark.parametrize("num_writes", [0, 1, 2, 9])
def test_apply_write(num_writes: int, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    rng = np.random.default_rng(num_writes)
    output = torch.zeros(shape, dtype=dtype)
    rows = rng.permutation(MAX_REQS)[:num_writes]
    starts = rng.integers(0, 20, num_writes) if len(shape) == 2 else np.zeros(num_writes, dtype=int)
    lengths = rng.integers(0, 20, num_writes) if len(shape) == 2 else np.ones(num_writes, dtype=int)
    ends = lengths.cumsum()
    contents = ints(rng, int(lengths.sum()), 1, 99, dtype)
    expected = output.clone()
    for program in range(num_writes):
        for i in range(lengths[program]):
            at = rows[program] * output.stride(0) + starts[program] + i
            expected.view(-1)[at] = contents[ends[program] - lengths[program] + i]
    as_i32 = [torch.from_numpy(x.astype(np.int32)) for x in (rows, starts, ends)]
    twins.apply_write(output, output.stride(0), as_i32[0], as_i32[1], contents, as_i32[2], None, False)
    assert torch.equal(output, expected)


@pytest.mark.parametrize("num_writes", [0, 1, 7])
def test_apply_write_of_several_groups(num_writes: int) -> None:
    rng = np.random.default_rng(num_writes)
    outputs = [torch.zeros(MAX_REQS, width, dtype=I32) for width in (9, 16, 33)]
    expected = [t.clone() for t in outputs]
    groups, rows = ints(rng, num_writes, 0, 3), ints(rng, num_writes, 0, MAX_REQS)
    starts, lengths = ints(rng, num_writes, 0, 4), rng.integers(0, 5, num_writes)
    contents = ints(rng, int(lengths.sum()), 1, 99)
    at = 0
    for program, length in enumerate(lengths.tolist()):
        group, row, start = (int(x[program]) for x in (groups, rows, starts))
        for i in range(length):
            expected[group][row, start + i] = contents[at + i]
        at += length
    strides = torch.tensor([t.stride(0) for t in outputs])
    ends = torch.from_numpy(lengths.cumsum().astype(np.int32))
    twins.apply_write(pointers(outputs), strides, rows, starts, contents, ends, groups, True)
    assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))


@pytest.mark.parametrize("reach", [None, (0, 0), (3, 40)])
@pytest.mark.parametrize("num_reqs", [0, 1, 4, MAX_REQS])
def test_gather_block_tables(num_reqs: int, reach: tuple[int, int] | None) -> None:
    rng = np.random.default_rng(num_reqs)
    widths, sizes = (5, 12), (16, 32)
    sources = [ints(rng, (MAX_REQS, w), 1, 99) for w in widths]
    targets = [ints(rng, (MAX_REQS, w), 100, 199) for w in widths]
    rows = rows_of(rng, num_reqs)
    counts = torch.stack([ints(rng, MAX_REQS, 0, w + 1) for w in widths])
    computed = ints(rng, MAX_REQS, 0, 200)
    expected = [t.clone() for t in targets]
    for group in range(2):
        for program in range(num_reqs):
            row = int(rows[program])
            null = 0
            if reach and reach[group] > 0:
                null = max(int(computed[row]) - reach[group], 0) // sizes[group]
            for i in range(int(counts[group, row])):
                expected[group][program, i] = sources[group][row, i] if i >= null else 0
    more = {}
    if reach:
        more = {
            "num_computed_tokens_ptr": computed,
            "sliding_window_reach_ptr": torch.tensor(reach, dtype=I32),
            "block_sizes_ptr": torch.tensor(sizes, dtype=I32),
            "MASK_SLIDING_WINDOW": True,
        }
    strides = torch.tensor(widths)
    twins.gather_block_tables(rows, pointers(sources), pointers(targets), strides, counts, num_reqs, **more)
    assert all(torch.equal(a, b) for a, b in zip(targets, expected, strict=True))
