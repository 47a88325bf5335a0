"""What the host knows of a batch saves work and changes no bit: ops with flags that are true, beside ops without."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch

from tests.unit.batches import Batch, FakeJob, run_alone
from vllm_d2cache.ops.columns import columns, lines_of, numbers_of
from vllm_d2cache.ops.ranking import choose_commits
from vllm_d2cache.ops.refresh_choice import Outcome, select_masked
from vllm_d2cache.ops.step_rows import choose_rows, page_slots, store_plan
from vllm_d2cache.ops.texts import Edits, commit_texts

CPU = torch.device("cpu")
LINES, WIDTH, TOTAL, COLUMNS = 6, 9, 14, 20
SLOTS = torch.tensor([3, 0, 2, 5])
PROMPTS, CANVASES = torch.tensor([5, 2, 3, 4]), torch.tensor([9, 4, 1, 9])
SEEDS = range(12)


class Texts:
    """Four texts of random masks; each window is the whole canvas."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.in_canvas = columns(WIDTH, CPU) < CANVASES.unsqueeze(1)
        self.masked = self.marks(4, WIDTH, share=0.6) & self.in_canvas
        if seed % 3 == 0:
            self.masked[seed % 4] = False  # a text that is over
        self.live = self.marks(4, WIDTH, share=0.9).cumprod(1).bool()
        self.integers = torch.zeros(10, 4, dtype=torch.int64)
        self.integers[0], self.integers[1], self.integers[5] = PROMPTS, CANVASES, CANVASES
        self.integers[3] = self.integers[4] = torch.tensor([1, 2, 3, 4])

    def marks(self, *shape: int, share: float = 0.5) -> torch.Tensor:
        return torch.rand(*shape, generator=self.generator) < share


def same(got: Any, want: Any) -> None:
    for x, y in zip(got, want, strict=True):
        if isinstance(x, tuple):
            same(x, y)
        else:
            assert x.dtype == y.dtype and torch.equal(x, y)


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("seed", SEEDS)
def test_rows(seed: int, ordered: bool, shift: int) -> None:
    b = Texts(seed)
    if ordered:
        b.integers[9] = torch.tensor([0, 2, 1, 3])
    tables = [b.marks(LINES, COLUMNS), torch.zeros(LINES, COLUMNS).bool(), torch.ones(LINES, COLUMNS).bool()]
    told = [b.marks(LINES, COLUMNS) for _ in range(3)]
    for observes, revises in product((None, b.marks(4)), repeat=2):
        rest = (b.integers, b.masked, b.live, observes, revises, ordered, shift, TOTAL)
        want = choose_rows(SLOTS, *tables, *rest)
        for known in ({"told": False}, {"one_window": True}, {"told": False, "one_window": True}):
            same(choose_rows(SLOTS, *tables, *rest, **known), want)
        same(choose_rows(SLOTS, *told, *rest, one_window=True), choose_rows(SLOTS, *told, *rest))


@pytest.mark.parametrize("seed", SEEDS)
def test_commits(seed: int) -> None:
    for revoked, revised, held in product((False, True), repeat=3):
        found = []
        for known in ({}, {"one_window": True}):
            b = Texts(seed)
            tokens = torch.arange(LINES * (COLUMNS + 1)).view(LINES, -1).int()
            tables = [b.marks(LINES, COLUMNS, share=0.2) for _ in range(2)]
            counts = torch.ones(7, LINES, dtype=torch.int64)
            flags = [b.in_canvas & b.marks(4, WIDTH) if on else None for on in (revoked, revised)]
            commits = b.masked & b.marks(4, WIDTH)
            edits = Edits(commits, torch.full((4, WIDTH), 7).int(), *flags, b.marks(4) if held else None)
            stop_ids = torch.tensor([[7 if line % 2 else -1] for line in range(LINES)]).int()
            after = commit_texts(
                SLOTS, b.integers, b.masked, edits, tokens, *tables, counts, stop_ids, 99, TOTAL, None, **known
            )
            found.append([*after, tokens, *tables, counts])
        same(found[1], found[0])


@pytest.mark.parametrize("seed", SEEDS)
def test_stage_one(seed: int) -> None:
    b = Texts(seed)
    score, density = (torch.rand(4, WIDTH, generator=b.generator) for _ in range(2))
    memory = torch.rand(LINES, COLUMNS, generator=b.generator)
    most = torch.tensor([1, 2, 3, 40, 5, 6])
    nobody, some = torch.zeros(4, dtype=torch.bool), b.marks(4)
    start = torch.zeros(4, dtype=torch.int64)
    for first, latest in product((nobody, some), (torch.zeros(LINES).long(), b.marks(LINES).long())):
        outcome, found = Outcome(b.masked & b.marks(4, WIDTH), score, first, start), []
        fresh, follows = bool(first.any()), bool(latest.any())
        for known in (
            {},
            {"fresh": fresh, "follows": follows},
            {"fresh": fresh, "follows": follows, "one_window": True},
        ):
            kept = memory.clone()
            chosen = select_masked(
                SLOTS, kept, latest, most, density, b.integers, b.masked, b.live, outcome, **known
            )  # fmt: skip
            found.append([chosen, kept])
        same(found[1], found[0])
        same(found[2], found[0])


@pytest.mark.parametrize("seed", SEEDS)
def test_a_single_commit(seed: int) -> None:
    b = Texts(seed)
    score = torch.randint(0, 3, (4, WIDTH), generator=b.generator).float()  # ties, too
    score[0] = -torch.inf
    one = torch.ones(4, dtype=torch.int64)
    assert torch.equal(
        choose_commits(score, b.masked, one, None, None, True), choose_commits(score, b.masked, one, None, None)
    )


def test_rows_without_padding() -> None:
    table, request, positions = torch.arange(12).view(4, 3).int(), torch.tensor([0, 1, 1, 3]), torch.arange(4)
    everything = torch.ones(4, dtype=torch.bool)
    rows = (table, request, positions, everything, 2)
    assert torch.equal(page_slots(*rows, exact=True), page_slots(*rows))


def test_a_plan_of_nothing_more_leaves_the_tables_alone() -> None:
    b = Texts(0)
    tables = tuple(b.marks(LINES, COLUMNS) for _ in range(3))
    before, refresh = [table.clone() for table in tables], b.marks(4, TOTAL)
    store_plan(SLOTS, refresh, None, None, tables)
    assert torch.equal(lines_of(tables[0], SLOTS, TOTAL), refresh)
    same(tables[1:], before[1:])


def test_numbers_go_with_their_tensor() -> None:
    table = torch.tensor([[1, 2], [3, 4]])
    assert numbers_of(table) == ((1, 2), (3, 4))
    assert numbers_of(table) is numbers_of(table)
    assert numbers_of(table[0]) == (1, 2)
    assert numbers_of(table + 1) == ((2, 3), (4, 5))
    assert numbers_of(torch.tensor([0.5])) == (0.5,)


@pytest.mark.parametrize("before", ["elastic", "window_diffusion", "d2cache"])
@pytest.mark.parametrize("policy", ["prefix", "d2cache"])
def test_a_slot_forgets_what_the_plans_of_its_last_tenant_said(before: str, policy: str) -> None:
    """The tables of plans are written only where a plan says more than what to refresh, or the last one did."""
    first, job = (
        FakeJob([1, 2, 3], 8, {"policy": name, **more}, noise=3)
        for name, more in ((before, {"confidence_memory": "latest"} if before == "d2cache" else {}), (policy, {}))
    )
    batch, want = Batch([first, job.fresh()]), run_alone(job)
    batch.slot = lambda i: 1  # type: ignore[method-assign]
    batch.add(0)
    for _ in range(3):
        batch.step([0])
    told = batch.runner.canvas.told
    assert told == {1}
    batch.runner.remove(1)
    batch.add(1)
    while not batch.jobs[1].done:
        batch.step([1])
        assert not told
    assert batch.jobs[1].steps == want.steps


def test_what_mates_tell_is_theirs_alone() -> None:
    jobs = [
        FakeJob([1, 2, 3], 8, {"policy": policy}, noise=n) for n, policy in enumerate(("elastic", "prefix", "d2cache"))
    ]
    batch = Batch([job.fresh() for job in jobs])
    for i in range(3):
        batch.add(i)
    for _ in range(3):
        batch.step([2, 0, 1])
        assert batch.runner.canvas.told == {batch.slot(0)}
    batch = Batch([job.fresh() for job in jobs])
    batch.run()
    for got, job in zip(batch.jobs, jobs, strict=True):
        assert got.steps == run_alone(job).steps
