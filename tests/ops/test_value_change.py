"""Which rows changed most, against loops."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_d2cache.ops.value_change import change_parts, cosine_distance, most_changed, swap_values


def test_distance_is_that_of_torchs_cosine() -> None:
    new, old = torch.randn(7, 3, 5), torch.randn(7, 3, 5)
    want = 1 - torch.cosine_similarity(new.flatten(1), old.flatten(1), dim=-1)
    torch.testing.assert_close(cosine_distance(change_parts(new, old)), want)
    halves = change_parts(new[:, :1], old[:, :1]) + change_parts(new[:, 1:], old[:, 1:])
    torch.testing.assert_close(cosine_distance(halves), want)


def test_small_changes_are_told_apart() -> None:
    """Their cosines are within a rounding of each other in fp32. Other lengths do not count."""
    old = torch.randn(2, 1, 64, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(2, 1, 64, generator=torch.Generator().manual_seed(1))
    new = old * 1.001 + noise * torch.tensor([1e-4, 2e-4]).view(2, 1, 1)
    want = 1 - torch.cosine_similarity(new.double().flatten(1), old.double().flatten(1), dim=-1)
    assert 0 < float(want[1] - want[0]) < 2**-24
    got = cosine_distance(change_parts(new, old))
    assert got[0] < got[1]
    torch.testing.assert_close(got, want.float(), rtol=0, atol=1e-9)


def test_zero_values_are_not_divided_by() -> None:
    assert cosine_distance(change_parts(torch.zeros(1, 2, 3), torch.ones(1, 2, 3))).tolist() == [1.0]


@given(st.lists(st.tuples(st.lists(st.integers(0, 4), max_size=8), st.integers(0, 9)), min_size=1, max_size=5))
def test_the_most_changed_of_each_request(requests: list[tuple[list[int], int]]) -> None:
    distance = torch.tensor([float(x) for values, _ in requests for x in values])
    request = torch.tensor([r for r, (values, _) in enumerate(requests) for _ in values], dtype=torch.int64)
    count = torch.tensor([c for _, c in requests])
    got = most_changed(distance, request, count).tolist()
    offset = 0
    for values, c in requests:
        order = sorted(range(len(values)), key=lambda i: (-values[i], i))
        assert [i for i in range(len(values)) if got[offset + i]] == sorted(order[:c])
        offset += len(values)


def test_values_are_swapped_in_their_pages() -> None:
    cache = torch.randn(3, 2, 16, 10)  # [blocks, kv heads, block size, 2 * head size]
    before = cache.clone()
    slots = torch.tensor([5, 40, 16])
    value = torch.randn(3, 2, 5)
    old = swap_values(cache, value, slots)
    for i, slot in enumerate(slots.tolist()):
        block, offset = divmod(slot, 16)
        assert torch.equal(old[i], before[block, :, offset, 5:])
        assert torch.equal(cache[block, :, offset, 5:], value[i])
    assert torch.equal(cache[..., :5], before[..., :5]), "keys stay"
    assert int((cache != before).any(-1).sum()) == 3 * 2
