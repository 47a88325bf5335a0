"""What is worked out for a batch is kept as long as the batch is the same, and no longer."""

from __future__ import annotations

from collections.abc import Sequence

from vllm_d2cache.canvas.standing import Standing


def test_is_worked_out_again_for_other_slots_another_order_and_after_forget() -> None:
    asked: list[list[int]] = []

    def work_out(slots: Sequence[int]) -> list[int]:
        asked.append(list(slots))
        return list(slots)

    standing, slots = Standing(work_out), [1, 2]
    first = standing.of(slots)
    assert standing.of([1, 2]) is first
    slots.append(3)  # the caller's list is not kept
    assert standing.of(slots) == [1, 2, 3]
    standing.of([3, 2, 1])
    standing.of([3, 2, 1])
    standing.forget()
    standing.of([3, 2, 1])
    assert asked == [[1, 2], [1, 2, 3], [3, 2, 1], [3, 2, 1]]
