"""Which waiting requests a step may admit; a scheduler without an engine."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from vllm.v1.core.sched.scheduler import Scheduler

from vllm_d2cache.canvas.extent import Extent
from vllm_d2cache.engine.scheduler import D2CacheScheduler

pytestmark = pytest.mark.vllm


class Waiting(SimpleNamespace):
    """A waiting request: its positions, its rows in later steps, and whether its grammar is ready."""

    ready: bool = True


@pytest.fixture
def scheduler(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(Scheduler, "_handle_blocked_waiting_request", lambda self, request: request.ready)
    made = D2CacheScheduler.__new__(D2CacheScheduler)
    made.running, made.max_num_scheduled_tokens, made._most_active = [], 100, 8
    made._extents, made._held, made._admitted, made._started, made.waiting = {}, {}, set(), set(), []
    made._memory = 0
    return made


def wait(scheduler: Any, name: str, tokens: int, rows: int, ready: bool = True) -> Waiting:
    request = Waiting(request_id=name, num_computed_tokens=0, num_output_tokens=0, ready=ready)
    scheduler.waiting.append(request)
    scheduler._extents[name], scheduler._held[name] = Extent(tokens // 2, tokens, rows), 0
    return request


def test_in_queue_order_as_many_as_fit_now_and_later(scheduler: Any) -> None:
    wait(scheduler, "a", 60, 10)
    wait(scheduler, "b", 60, 10)
    wait(scheduler, "c", 5, 1)
    assert scheduler._admissible() == {"a"}
    scheduler.max_num_scheduled_tokens = 125
    assert scheduler._admissible() == {"a", "b", "c"}
    scheduler._extents["b"] = Extent(30, 60, 120)
    assert scheduler._admissible() == {"a"}


def test_a_prompt_in_pieces_takes_a_piece_until_its_first_step(scheduler: Any) -> None:
    """Of 100 rows: a prompt of 300 positions asks for 40 in each step, and then for two blocks of four."""
    long = wait(scheduler, "long", 400, 8)
    wait(scheduler, "more", 400, 8)
    wait(scheduler, "most", 400, 8)
    for name in ("long", "more", "most"):
        scheduler._extents[name] = Extent(300, 400, 8, block=4, piece=40)
    assert scheduler._admissible() == {"long", "more"}
    scheduler.waiting.remove(long)
    scheduler.running.append(long)
    long.num_computed_tokens = 40
    assert scheduler._admissible() == {"more"}
    assert scheduler._mamba_block_aligned_split(long, 100) == 40
    assert scheduler._mamba_block_aligned_split(long, 39) == 0
    scheduler._started.add("long")
    assert scheduler._admissible() == {"more", "most"}
    assert scheduler._mamba_block_aligned_split(long, 8) == 8


def test_who_waits_for_a_grammar_lets_others_pass_and_is_not_admitted_uncounted(scheduler: Any) -> None:
    late = wait(scheduler, "grammar", 90, 90, ready=False)
    wait(scheduler, "free", 90, 90)
    scheduler._admitted = scheduler._admissible()
    assert scheduler._admitted == {"free"}
    # Ready a moment later, while the step is being scheduled: both together would not fit.
    late.ready = True
    assert not scheduler._handle_blocked_waiting_request(late)
    assert scheduler._handle_blocked_waiting_request(scheduler.waiting[1])
    scheduler._admitted = scheduler._admissible()
    assert scheduler._admitted == {"grammar"}
