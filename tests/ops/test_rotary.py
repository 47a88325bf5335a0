"""Rotation and pages against complex numbers, and against the rotation that the models use."""

from __future__ import annotations

import pytest
import torch

from tests.triton.paged import Shape, make_batch
from vllm_d2cache.ops.rotary import rotate_and_write


def table(length: int, dim: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """[length, dim] cosines and sines."""
    angle = torch.arange(length)[:, None] / 100.0 ** (torch.arange(0, dim, 2) / dim)
    return torch.cat([angle.cos(), angle.sin()], 1).to(dtype)


def test_a_rotation_is_a_product_of_complex_numbers() -> None:
    shape = Shape(4, 2, 12)
    batch = make_batch([5, 3], [20, 33], shape, torch.device("cpu"))
    key, value = torch.randn(2, 8, 2, 12)
    out, keys = torch.empty_like(batch.query), torch.empty_like(key)
    cos_sin, positions, slots = table(40, 8), batch.positions, batch.layout.slots
    rotate_and_write(batch.cache, batch.query, key, value, positions, cos_sin, slots, out, keys)
    turn = torch.polar(torch.ones(40, 4), torch.atan2(cos_sin[:, 4:], cos_sin[:, :4]))[positions].unsqueeze(1)
    for x, rotated in ((batch.query, out), (key, keys)):
        product = torch.complex(x[..., :4], x[..., 4:8]) * turn
        torch.testing.assert_close(rotated[..., :8], torch.cat([product.real, product.imag], -1))
        assert torch.equal(rotated[..., 8:], x[..., 8:])
    page = batch.cache[slots // 16, :, slots % 16]
    assert torch.equal(page[..., :12], keys)
    assert torch.equal(page[..., 12:], value)


@pytest.mark.vllm
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_it_is_the_rotation_of_the_models(dtype: torch.dtype) -> None:
    """models/common.py: in fp32, rounded once."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.rotary_embedding import get_rope

    with set_current_vllm_config(VllmConfig()):
        rope = get_rope(32, 64, rope_parameters={"rope_theta": 10000.0}, dtype=torch.float32)
    shape = Shape(4, 2, 32, 16, dtype)
    batch = make_batch([5, 3], [20, 33], shape, torch.device("cpu"))
    key = torch.randn(8, 2, 32).to(dtype)
    q, k = rope.forward_native(batch.positions, batch.query.flatten(1).float(), key.flatten(1).float())
    out, keys = torch.empty_like(batch.query), torch.empty_like(key)
    slots = batch.layout.slots
    rotate_and_write(batch.cache, batch.query, key, key, batch.positions, rope.cos_sin_cache, slots, out, keys)
    assert torch.equal(out, q.to(dtype).view_as(out))
    assert torch.equal(keys, k.to(dtype).view_as(keys))
