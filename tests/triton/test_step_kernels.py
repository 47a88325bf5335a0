"""What a step does to texts, rows, commits and plans: kernels against their PyTorch twins, to the last bit."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch

from vllm_d2cache.ops import ranking, refresh_choice, row_sampling, step_rows, texts
from vllm_d2cache.ops.triton import ranking as ranking_kernels
from vllm_d2cache.ops.triton import refresh_choice as refresh_kernels
from vllm_d2cache.ops.triton import row_sampling as sampling_kernels
from vllm_d2cache.ops.triton import step_rows as rows_kernels
from vllm_d2cache.ops.triton import texts as text_kernels

NUM_SLOTS, LONGEST = 6, 2600
# Slot, prompt and canvas of each request; the second batch is longer than a stretch of a kernel.
BATCHES = [[(4, 9, 12), (0, 3, 31), (2, 40, 1)], [(5, 1100, 1300), (1, 7, 40)]]


class Batch(NamedTuple):
    """Random texts, in the middle of their requests."""

    slots: torch.Tensor
    tokens: torch.Tensor
    masked: torch.Tensor
    terminal: torch.Tensor
    counts: torch.Tensor
    numbers: torch.Tensor
    stop_ids: torch.Tensor
    generator: torch.Generator

    @property
    def width(self) -> int:
        """Canvas slots of the widest."""
        return int(self.counts[1, self.slots].max())

    @property
    def total(self) -> int:
        """Positions of the longest."""
        return int((self.counts[0] + self.counts[1])[self.slots].max())

    def flags(self, width: int, share: float = 0.5) -> torch.Tensor:
        """[R, width] bool, True with that probability."""
        return (torch.rand(len(self.slots), width, generator=self.generator) < share).to(self.slots.device)

    def numbers_like(self, width: int) -> torch.Tensor:
        """[R, width] float32 in [0, 1), many of them equal."""
        drawn = torch.rand(len(self.slots), width, generator=self.generator)
        return torch.where(drawn < 0.5, (drawn * 8).round() / 8, drawn).to(self.slots.device)

    def column(self, *values: float) -> torch.Tensor:
        """[S] of these values in turn, of their own type."""
        return torch.tensor([values[i % len(values)] for i in range(NUM_SLOTS)], device=self.slots.device)

    def read(self, block: int | None = None) -> texts.Texts:
        """The texts of the batch, by the twin."""
        tables = (self.masked, self.terminal, self.counts, self.numbers)
        return texts.read_texts.__wrapped__(self.slots, *tables, self.width, block)


def batch(places: list[tuple[int, int, int]], device: torch.device, seed: int, longest_run: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    counts = torch.zeros(7, NUM_SLOTS, dtype=torch.int64)
    masked, terminal = (torch.zeros(NUM_SLOTS, LONGEST, dtype=torch.bool) for _ in range(2))
    numbers = torch.ones(NUM_SLOTS, 8)
    for slot, prompt, canvas in places:
        counts[:, slot] = torch.tensor([prompt, canvas, 3, 2, 1, slot == 4, 2])
        masked[slot, :canvas] = torch.rand(canvas, generator=generator) < 0.6
        terminal[slot, :canvas] = ~masked[slot, :canvas] & (torch.rand(canvas, generator=generator) < 0.5 / canvas)
        numbers[slot] = torch.tensor([min(8, canvas), 2, 0.7, 1.5, slot % 3, 10.0, 0, longest_run * (slot % 2)])
    tokens = torch.randint(0, 90, (NUM_SLOTS, LONGEST), generator=generator, dtype=torch.int32)
    stop_ids = torch.tensor([[3, -1], [7, 9]], dtype=torch.int32).repeat(NUM_SLOTS // 2, 1)
    slots = torch.tensor([slot for slot, _, _ in places])
    return Batch(*(x.to(device) for x in (slots, tokens, masked, terminal, counts, numbers, stop_ids)), generator)


def assert_same(got: Any, want: Any) -> None:
    """Bits, shapes and types."""
    if want is None:
        assert got is None
    elif isinstance(want, torch.Tensor):
        assert got.dtype == want.dtype
        assert got.shape == want.shape
        assert torch.equal(got, want)
    else:
        for mine, other in zip(got, want, strict=True):
            assert_same(mine, other)


cases = pytest.mark.parametrize("places", BATCHES, ids=["short", "long"])
seeds = pytest.mark.parametrize("seed", [0, 1])


blocks = pytest.mark.parametrize("block", [None, 8], ids=["whole", "in-blocks"])


@cases
@seeds
@blocks
def test_texts_are_read(places: list[tuple[int, int, int]], seed: int, block: int | None, device: torch.device) -> None:
    b = batch(places, device, seed)
    tables = (b.masked, b.terminal, b.counts, b.numbers)
    assert_same(text_kernels.read_texts(b.slots, *tables, b.width, block), b.read(block))


@cases
@seeds
@pytest.mark.parametrize("edits", ["commits", "revokes", "revises"])
@blocks
def test_commits_are_written(
    places: list[tuple[int, int, int]], seed: int, edits: str, block: int | None, device: torch.device
) -> None:
    results = []
    for commit in (texts.commit_texts.__wrapped__, text_kernels.commit_texts):
        b = batch(places, device, seed)
        now = b.read(block)
        committed = b.flags(b.width, 0.4) & now.masked
        again = b.flags(b.width, 0.2) & ~now.masked
        held = torch.arange(len(b.slots), device=device) % 2 == 0
        token = torch.randint(0, 12, committed.shape, generator=b.generator, dtype=torch.int32).to(device)
        tables = (b.tokens, b.masked, b.terminal, b.counts, b.stop_ids)
        more = {"commits": (None, None, None), "revokes": (again, None, None), "revises": (None, again, held)}[edits]
        made = texts.Edits(committed, token, *more)
        found = commit(b.slots, now.integers, now.masked, made, *tables, 99, b.total, block)
        results.append((found, *tables))
    want, got = results
    # Behind a canvas there is nothing to be masked, and nothing is.
    assert_same(got, want)


@cases
@seeds
@pytest.mark.parametrize("keeps", ["all", "open", "held"])
def test_tokens_are_handed_out(places: list[tuple[int, int, int]], seed: int, keeps: str, device: torch.device) -> None:
    results = []
    for emit in (texts.emit_texts.__wrapped__, text_kernels.emit_texts):
        b = batch(places, device, seed)
        now = b.read()
        masked = now.masked & (torch.arange(b.width, device=device) > 5)  # so that there is something to hand out
        some = torch.arange(len(b.slots), device=device) % 2 == 0
        kept = {"all": (None, None), "open": (some, None), "held": (some, ~some)}[keeps]
        found = emit(b.slots, now.integers, now.integers[2], masked, now.live, kept, b.tokens, b.counts)
        results.append((*found, b.counts))
    assert results[0][1].sum() > 0
    assert_same(results[1], results[0])


@cases
@seeds
@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("ordered", [False, True])
def test_rows_are_chosen_and_packed(
    places: list[tuple[int, int, int]], seed: int, shift: int, ordered: bool, device: torch.device
) -> None:
    b = batch(places, device, seed, longest_run=3 if ordered else 0)
    now = b.read()
    plans = [(torch.rand(NUM_SLOTS, LONGEST, generator=b.generator) < share).to(device) for share in (0.4, 0.3, 0.6)]
    everything = torch.arange(len(b.slots), device=device) % 2 == 1
    for some in ((None, None), (everything, None), (None, everything)):
        arguments = (b.slots, *plans, now.integers, now.masked, now.live, *some, ordered, shift, b.total)
        want = step_rows.choose_rows.__wrapped__(*arguments)
        assert_same(rows_kernels.choose_rows(*arguments), want)
    counts, predictions = want.sums.tolist()
    for spare in (0, 5):
        rooms = [[n + spare for n in counts], [n + spare for n in predictions]]
        places_of = torch.tensor(rooms, device=device)
        first = now.integers[0] - shift
        arguments = (b.slots, want.refresh, want.predicted, places_of, b.tokens, first, sum(rooms[0]), sum(rooms[1]))
        packed = step_rows.pack_rows.__wrapped__(*arguments)
        assert_same(rows_kernels.pack_rows(*arguments), packed)
        table = torch.randint(0, 500, (len(b.slots), -(-b.total // 16)), generator=b.generator).int().to(device)
        rows = (table, packed.request, packed.positions, packed.live, 16)
        assert_same(rows_kernels.page_slots(*rows), step_rows.page_slots.__wrapped__(*rows))
        n = len(packed.who)
        score, token = torch.rand(n, device=device), torch.randint(0, 99, (n,), device=device)
        for entropy in (None, torch.rand(n, device=device)):
            found = (want.predicted, packed.place, score, token, entropy)
            assert_same(rows_kernels.spread(*found), step_rows.spread.__wrapped__(*found))


@cases
@pytest.mark.parametrize(("observes", "chosen"), [(False, False), (True, False), (True, True)])
def test_plans_are_kept(places: list[tuple[int, int, int]], observes: bool, chosen: bool, device: torch.device) -> None:
    results = []
    for store in (step_rows.store_plan.__wrapped__, rows_kernels.store_plan):
        b = batch(places, device, 0)
        tables = tuple(torch.zeros(NUM_SLOTS, LONGEST, dtype=torch.bool, device=device) for _ in range(3))
        refresh, observe, candidates = b.flags(b.total), b.flags(b.width), b.flags(b.width)
        store(b.slots, refresh, observe if observes else None, candidates if chosen else None, tables)
        results.append(tables)
    assert_same(results[1], results[0])


RULES = [(None, None), (0.7, None), (None, 1.5), (0.9, 0.3), (0.0, 0.0), (0.5, 40.0)]


@cases
@seeds
@pytest.mark.parametrize("rules", RULES)
def test_commits_are_chosen(
    places: list[tuple[int, int, int]],
    seed: int,
    rules: tuple[float | None, float | None],
    device: torch.device,
) -> None:
    b = batch(places, device, seed)
    score, candidates = b.numbers_like(b.width), b.flags(b.width, 0.4)
    candidates[-1, 1:] = False
    for least in (0, 1, 3, 5000):
        n = len(b.slots)
        columns = [None if x is None else torch.full((n,), x, device=device) for x in rules]
        arguments = (score, candidates, torch.full((n,), least, device=device), *columns)
        want = ranking.choose_commits.__wrapped__(*arguments)
        assert_same(ranking_kernels.choose_commits(*arguments), want)


@cases
@seeds
@pytest.mark.parametrize("gamma", [0.0, 0.4, 3.0, 1e6])
def test_commits_are_chosen_by_entropy(
    places: list[tuple[int, int, int]], seed: int, gamma: float, device: torch.device
) -> None:
    b = batch(places, device, seed)
    score, candidates, entropy = b.numbers_like(b.width), b.flags(b.width, 0.4), b.numbers_like(b.width) / 3
    candidates[-1, 1:] = False
    for least in (0, 1, 3):
        n = len(b.slots)
        bounds = torch.full((n,), least, device=device), entropy, torch.full((n,), gamma, device=device)
        want = ranking.choose_by_entropy.__wrapped__(score, candidates, *bounds)
        assert_same(ranking_kernels.choose_by_entropy(score, candidates, *bounds), want)


@cases
@pytest.mark.parametrize("draws", [False, True])
def test_rows_are_sampled_with(places: list[tuple[int, int, int]], draws: bool, device: torch.device) -> None:
    b = batch(places, device, 0)
    who = torch.randint(0, len(b.slots), (300,), generator=b.generator).to(device)
    slot = torch.randint(0, 99, (300,), generator=b.generator).to(device)
    table = torch.rand(NUM_SLOTS, 3, generator=b.generator).to(device) * 5
    seeds = (b.column(-(1 << 63), 5, (1 << 63) - 1), b.column(0, 3)) if draws else None
    arguments = (who, slot, b.slots, b.counts[0, b.slots], table, seeds)
    want = row_sampling.sampling_of_rows.__wrapped__(*arguments)
    assert_same(sampling_kernels.sampling_of_rows(*arguments), want)


def test_no_candidates_no_commits(device: torch.device) -> None:
    b = batch(BATCHES[0], device, 0)
    none, one = torch.zeros(3, b.width, dtype=torch.bool, device=device), torch.ones(3, device=device)
    arguments = (b.numbers_like(b.width), none, one.long(), one * 0.5, one)
    assert_same(ranking_kernels.choose_commits(*arguments), none)
    assert_same(ranking.choose_commits.__wrapped__(*arguments), none)
    by_entropy = (*arguments[:3], b.numbers_like(b.width), one)
    assert_same(ranking_kernels.choose_by_entropy(*by_entropy), none)


@cases
@seeds
@pytest.mark.parametrize("k", [1, 4, 5000])
def test_stage_one(places: list[tuple[int, int, int]], seed: int, k: int, device: torch.device) -> None:
    results = []
    for select in (refresh_choice.select_masked.__wrapped__, refresh_kernels.select_masked):
        b = batch(places, device, seed)
        now = b.read()
        memory = (torch.rand(NUM_SLOTS, LONGEST, generator=b.generator) * 8).round().to(device) / 8
        first = torch.arange(len(b.slots), device=device) == 1
        outcome = refresh_choice.Outcome(b.flags(b.width), b.numbers_like(b.width), first, now.integers[2])
        density, options = b.numbers_like(b.width), (b.column(0, 0, 1), b.column(k, k + 1))
        chosen = select(b.slots, memory, *options, density, now.integers, now.masked, now.live, outcome)
        results.append((chosen, memory))
    assert results[0][0].any()
    assert_same(results[1], results[0])


@cases
@seeds
@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("p", [0.0, 0.1, 0.6, 1.0])
@pytest.mark.parametrize("equal", [False, True])
def test_stage_two(
    places: list[tuple[int, int, int]], seed: int, shift: int, p: float, equal: bool, device: torch.device
) -> None:
    b = batch(places, device, seed)
    now = b.read()
    if equal:
        importance = torch.ones(len(b.slots), b.total + 7, device=device)
    else:
        importance = torch.rand(len(b.slots), b.total + 7, generator=b.generator).to(device) ** 4
    lengths = (now.integers[0] + now.integers[1]).unsqueeze(1)
    importance *= torch.arange(importance.shape[1], device=device) < lengths
    selected, committed = b.flags(b.width, 0.2) & now.masked, b.flags(b.width, 0.1) & ~now.masked
    columns = (b.column(p, p), b.column(0, 4, 2, 1 << 40), b.column(0, 1), shift)
    arguments = (b.slots, importance[:, : b.total], selected, committed, now.masked, now.integers, *columns)
    # Both read rollout_p as fp64.
    arguments = tuple(x.double() if i == 6 else x for i, x in enumerate(arguments))
    want = refresh_choice.choose_refresh.__wrapped__(*arguments)
    assert_same(refresh_kernels.choose_refresh(*arguments), want)
