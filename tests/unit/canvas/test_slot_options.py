"""Options of running requests as columns: what is read of one is of the request that has the slot now."""

from __future__ import annotations

import torch

from vllm_d2cache.canvas.slot_options import SlotOptions
from vllm_d2cache.ops.columns import numbers_at, numbers_of
from vllm_d2cache.options.request import RequestOptions
from vllm_d2cache.options.types import Number


def test_numbers_are_of_the_request_that_has_the_slot() -> None:
    specs = {"share": Number(float, 0.0, 1.0), "count": Number(int, 1, 64)}
    kept = SlotOptions(specs, 3, torch.device("cpu"))
    slots = torch.tensor([2, 0])
    for share, count in ((0.25, 3), (0.75, 5)):
        for slot in (0, 2):
            kept.set(slot, RequestOptions(policy_options={"share": share + slot / 100, "count": count + slot}))
        # They are kept with the column from the first look to the next request.
        for _ in range(2):
            assert numbers_at(kept.columns["share"], slots) == (share + 0.02, share)
            assert numbers_of(kept.columns["count"]) == (count, 0, count + 2)
