"""What ops remember of a batch goes by its numbers, and is never written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from vllm_d2cache.ops import dispatch, refresh_choice, rollout, row_stats, text_columns, texts
from vllm_d2cache.ops.canvas_columns import to_positions, to_slots
from vllm_d2cache.ops.columns import FirstColumns, columns, no_cells, zeros
from vllm_d2cache.ops.refresh_choice import Outcome, choose_refresh, select_masked
from vllm_d2cache.ops.step_rows import choose_rows, pack_rows
from vllm_d2cache.ops.texts import Edits, commit_texts, emit_texts

CPU = torch.device("cpu")
# Equally shaped batches: prompts, canvases and windows of three rows; 9 slots and 14 positions at most.
BATCHES = [((5, 2, 3), (9, 4, 1), (9, 2, 1)), ((5, 2, 4), (9, 3, 1), (3, 3, 1)), ((1, 5, 2), (2, 9, 7), (2, 3, 5))]
SLOTS, WIDTH, TOTAL, LINES = torch.tensor([3, 0, 2]), 9, 14, 4


def integers_of(batch: tuple[tuple[int, ...], ...]) -> torch.Tensor:
    integers = torch.zeros(10, 3, dtype=torch.int64)
    integers[0], integers[1], integers[5] = (torch.tensor(numbers) for numbers in batch)
    return integers


def marks(seed: int, *shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) < 0.5


def step(batch: tuple[tuple[int, ...], ...], seed: int, shift: int = 0) -> list[Any]:
    """What all ops that keep records make of a batch."""
    integers, canvas = integers_of(batch), torch.tensor(batch[1]).unsqueeze(1)
    masked = marks(seed, 3, WIDTH) & (columns(WIDTH, CPU) < canvas)
    live, start = torch.ones_like(masked), torch.tensor([0, 1, 0])
    tables = [marks(seed + n, LINES, 20) for n in range(3)]
    counts, tokens = torch.zeros(7, LINES, dtype=torch.int64), torch.arange(LINES * 21).view(LINES, 21).int()
    chosen = choose_rows(SLOTS, *tables, integers, masked, live, None, None, False, shift, TOTAL)
    edits = Edits(masked & marks(seed + 3, 3, WIDTH), torch.full((3, WIDTH), 7).int(), None, None, None)
    stop_ids = torch.full((LINES, 1), -1).int()
    committed = commit_texts(
        SLOTS, integers, masked, edits, tokens, *tables[:2], counts, stop_ids, 99, TOTAL, None
    )  # fmt: skip
    memory, score = torch.zeros(LINES, 20), torch.rand(3, WIDTH, generator=torch.Generator().manual_seed(seed))
    latest, most = torch.ones(LINES).long(), torch.full((LINES,), 2)
    found = Outcome(masked, score, torch.zeros(3, dtype=torch.bool), start)
    selected = select_masked(SLOTS, memory, latest, most, score, integers, committed.masked, live, found)
    importance, p = torch.rand(3, TOTAL, generator=torch.Generator().manual_seed(seed)), torch.full((LINES,), 0.4)
    importance *= columns(TOTAL, CPU) < (integers[0] + integers[1]).unsqueeze(1)
    refresh = choose_refresh(
        SLOTS, importance, selected, edits.committed, committed.masked, integers, p.double(), most, latest, shift
    )
    emitted = emit_texts(SLOTS, integers, start, committed.masked, live, (None, None), tokens, counts)
    after, changes, *flags = committed
    return [*chosen, after, *changes, *flags, selected, *refresh, *emitted, tokens, memory, counts, *tables]


def forget() -> None:
    for make in (*RECORDS, refresh_choice._bounds, refresh_choice._first_k, rollout._shares, texts._step_more):
        kept(make).cache_clear()


def record(made: Any) -> tuple[torch.Tensor, ...]:
    """The tensors of what a function has made."""
    return made if isinstance(made, tuple) else (made,)


def kept(make: Callable[..., Any]) -> Any:
    """The memory of a function that remembers."""
    if hasattr(make, "cache_clear"):
        return make
    return next(cell.cell_contents for cell in make.__closure__ or () if hasattr(cell.cell_contents, "cache_clear"))


RECORDS = (
    text_columns.slot_map, text_columns.position_map, text_columns.text_columns, text_columns.canvas_cells,
    text_columns.window_columns,
)  # fmt: skip


@pytest.mark.parametrize("shift", [0, 1])
def test_another_batch_of_the_same_shapes_has_its_own_numbers(shift: int) -> None:
    want = []
    for seed, batch in enumerate(BATCHES):
        forget()
        want.append(step(batch, seed, shift))
    for _ in range(2):
        for seed, batch in enumerate(BATCHES):
            for got, expected in zip(step(batch, seed, shift), want[seed], strict=True):
                assert torch.equal(got, expected)


def test_nothing_that_is_remembered_is_written() -> None:
    forget()
    prompt, canvas, window = BATCHES[0]
    asked: list[tuple[Callable[..., Any], tuple[Any, ...]]] = [
        (text_columns.slot_map, (prompt, WIDTH, canvas, TOTAL, CPU)),
        (text_columns.position_map, (prompt, TOTAL, canvas, WIDTH, CPU)),
        (text_columns.text_columns, (prompt, TOTAL, canvas, CPU)),
        (text_columns.canvas_cells, (prompt, WIDTH, canvas, (2, 0, 1), 21, CPU)),
        (text_columns.window_columns, ((0, 1, 0), WIDTH, window, canvas, CPU)),
    ]
    before = [[x.clone() for x in record(make(*arguments))] for make, arguments in asked]
    for seed in range(5):
        step(BATCHES[0], seed)
    assert kept(text_columns.window_columns).cache_info().hits >= 5
    for (make, arguments), saved in zip(asked, before, strict=True):
        for got, expected in zip(record(make(*arguments)), saved, strict=True):
            assert torch.equal(got, expected)
    assert zeros(3, CPU).tolist() == [0, 0, 0]
    assert texts._step_more(CPU).flatten().tolist() == [0, 0, 0, 1, 1, 0, 0, 0, 0, 0]
    assert refresh_choice._first_k((1, 0, 5), 3, CPU).int().tolist() == [[1, 0, 0], [0, 0, 0], [1, 1, 1]]
    assert refresh_choice._bounds((0.5, 1.0), 2, CPU).tolist() == [[torch.inf, 0.5], [torch.inf, torch.inf]]
    assert not no_cells(2, 3, CPU).any()


def test_large_records_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_columns, "_MOST_ELEMENTS", 3 * TOTAL - 1)
    forget()
    prompt, canvas, _ = BATCHES[0]
    for rows, remembered in ((2, True), (3, False)):
        first, second = (text_columns.text_columns(prompt[:rows], TOTAL, canvas[:rows], CPU) for _ in range(2))
        assert (first is second) == remembered
        assert torch.equal(first.inside, second.inside)


def test_slots_and_positions_by_hand() -> None:
    first, length = torch.tensor([1, 3]), torch.tensor([3, 1])
    numbers = torch.tensor([[5, 6, 7], [8, 9, 9]])
    assert to_positions(numbers, first, length, 5).tolist() == [[0, 5, 6, 7, 0], [0, 0, 0, 8, 0]]
    flags = torch.tensor([[True, True, False, True], [True] * 4])
    assert to_slots(flags, first, length, 4).tolist() == [[True, False, True, False], [True, False, False, False]]
    # Positions that no column stands for hold nothing.
    assert to_slots(flags, first + 1, length + 1, 3).tolist() == [[False, True, False], [False, False, False]]


@pytest.mark.parametrize("seed", range(4))
def test_rows_packed_exactly_are_packed_rows(seed: int) -> None:
    prompt, canvas = torch.tensor([4, 1, 6]), torch.tensor([3, 5, 2])
    slot = columns(5, CPU)
    predicted = marks(seed, 3, 5) & (slot < canvas.unsqueeze(1))
    chosen = marks(seed + 9, 3, 8) | to_positions(predicted, prompt, canvas, 8)
    tokens = torch.randint(0, 99, (LINES, 9), dtype=torch.int32)
    counts, predictions = chosen.sum(1), predicted.sum(1)
    places = torch.stack([counts, predictions])
    sizes = (int(counts.sum()), int(predictions.sum()))
    want = pack_rows(SLOTS, chosen, predicted, places, tokens, prompt, *sizes)
    got = pack_rows(SLOTS, chosen, predicted, places, tokens, prompt, *sizes, exact=True)
    for a, b in zip(got, want, strict=True):
        assert (a.dtype, a.is_contiguous()) == (b.dtype, True)
        assert torch.equal(a, b)


def test_first_columns_are_part_of_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    first, table = FirstColumns(), torch.zeros(2, 6)
    (view,) = first.of(4, table)
    view[1, 3] = 1
    assert table[1, 3] == 1
    assert first.of(4, table)[0] is view
    assert first.of(4, torch.ones(2, 6))[0][0, 0] == 1
    assert [x.shape[1] for x in first.of(4, table, torch.ones(2, 6))] == [4, 4]
    for width in range(1, 7):
        for _ in range(20):
            assert first.of(width, torch.full((2, 6), float(width)))[0].sum() == 2 * width * width
    assert len(first._views) <= FirstColumns._MOST
    monkeypatch.setitem(dispatch._chosen, "cpu", "triton")
    assert first.of(4, table)[0] is table  # kernels take lines as wide as they lie


def test_statistics_of_a_known_vocabulary_take_one_tile() -> None:
    rows, vocab, calls = row_stats.ROWS_PER_TILE + 9, 30, []
    logits = torch.randn(rows, vocab)

    def head(x: torch.Tensor) -> torch.Tensor:
        calls.append(len(x))
        return x.clone()

    params = row_stats.RowParams(torch.zeros(rows), torch.ones(rows), torch.zeros(rows).long(), None, False, False)
    want = row_stats.row_stats(logits, head, params, vocab - 1, True, True)
    got = row_stats.row_stats(logits, head, params, vocab - 1, True, True, vocab_size=vocab)
    assert calls == [row_stats.ROWS_PER_TILE, 9, rows]
    for name in ("token", "confidence", "margin", "entropy"):
        assert torch.equal(getattr(got, name), getattr(want, name))


def test_one_stop_token_each_is_any_of_one() -> None:
    token = torch.tensor([[1, 2, 3], [2, 2, 1]])
    one, two = torch.tensor([[2], [1]]), torch.tensor([[2, -1], [1, -1]])
    assert texts._stops(token, one).tolist() == [[False, True, False], [False, False, True]]
    assert torch.equal(texts._stops(token, one), texts._stops(token, two))
