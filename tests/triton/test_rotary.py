"""Rotation and page write in one kernel, against the PyTorch twin: the same bits.

But for bfloat16 in Triton's interpreter, which cuts numbers off where a GPU rounds them.
"""

from __future__ import annotations

import pytest
import torch

from tests.ops.test_rotary import table
from tests.triton.conftest import INTERPRETED
from tests.triton.paged import Shape, make_batch
from vllm_d2cache.ops import rotary as twin
from vllm_d2cache.ops.triton import rotary as kernels

SHAPES = [
    (Shape(4, 4, 64), 64),
    (Shape(7, 1, 32, 16, torch.bfloat16), 32),
    (Shape(20, 20, 32, 16, torch.bfloat16), 16),  # a part of a head is rotated; heads for two programs
    (Shape(6, 2, 96, 48, torch.float16), 24),
    (Shape(4, 2, 24), 20),
]


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize(("shape", "dim"), SHAPES, ids=str)
def test_rotation_and_pages(shape: Shape, dim: int, in_place: bool, device: torch.device) -> None:
    batch = make_batch([5, 0, 3], [20, 9, 33], shape, device, padding=[1, 0, 2])
    shadows = 2  # rows behind those that have pages
    rows = 8 + shadows
    wide = torch.randn(rows, shape.heads + 2 * shape.kv_heads, shape.head_size, device=device).to(shape.dtype)
    positions = torch.cat([batch.positions, torch.tensor([3, 30], device=device)])
    cos_sin = table(40, dim, torch.float32 if in_place else shape.dtype).to(device)
    live = torch.cat([batch.live, torch.ones(shadows, dtype=torch.bool, device=device)])
    wide[~live] = torch.nan
    caches, results = [batch.cache.clone(), batch.cache.clone()], []
    for module, cache in zip((twin, kernels), caches, strict=True):
        q, k, v = wide.clone().split([shape.heads, shape.kv_heads, shape.kv_heads], dim=1)
        out, keys = (q, k) if in_place else (torch.empty_like(q), None)
        module.rotate_and_write(cache, q, k, v, positions, cos_sin, batch.layout.slots, out, keys)
        results.append((out, k))
    (want, want_keys), (got, got_keys) = results
    cut_off = 2**-7 if INTERPRETED and shape.dtype == torch.bfloat16 else 0
    torch.testing.assert_close(got, want, rtol=cut_off, atol=0)
    assert (got[~live] == 0).all()
    torch.testing.assert_close(got_keys[live], want_keys[live], rtol=cut_off, atol=0)
    assert (got_keys[live] == wide[live, shape.heads : -shape.kv_heads]).all() != in_place
    caches = [cache[1:].nan_to_num(7.5) for cache in caches]  # the twin's padding rows write to nobody's block
    torch.testing.assert_close(*caches, rtol=cut_off, atol=0)


def test_no_row_at_all(device: torch.device) -> None:
    batch = make_batch([0], [20], SHAPES[0][0], device)
    before, none = batch.cache.clone(), torch.empty(0, 4, 64, device=device)
    index = torch.empty(0, dtype=torch.int64, device=device)
    kernels.rotate_and_write(batch.cache, none, none, none, index, table(20, 64).to(device), index, none)
    assert torch.equal(batch.cache.nan_to_num(7.5), before.nan_to_num(7.5))
