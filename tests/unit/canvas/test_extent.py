"""How far a text reaches in a scheduler, and in which pieces a prompt is computed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_d2cache.canvas.extent import Extent, piece_length, settled_positions


def test_a_text_whose_rows_see_everything_is_one_piece() -> None:
    extent = Extent(prompt_len=10, total=30, budget=8)
    assert extent.known(0) == extent.known(17) == extent.first(0, 0) == 30
    assert (extent.resumed_at(0), extent.later(0, 0), extent.settled(9)) == (22, 8, 0)


def test_a_text_in_blocks_reaches_one_block_beyond_that_of_the_next_token() -> None:
    extent = Extent(prompt_len=10, total=32, budget=8, block=4, piece=12)
    # Position 10 is in block 8 to 11; the one behind it is there already.
    assert [extent.known(n) for n in (0, 1, 2, 5, 6, 22)] == [16, 16, 20, 20, 24, 32]
    assert [extent.settled(n) for n in (0, 1, 2, 5, 6)] == [8, 8, 12, 12, 16]


def test_the_pieces_of_a_prompt() -> None:
    extent = Extent(prompt_len=31, total=64, budget=8, block=4, piece=12)
    pieces, start = [], 0
    while start < extent.known(0):
        pieces.append(extent.first(start, 0))
        start += pieces[-1]
    # 28 positions are whole blocks; the last step has the open block and one behind it.
    assert pieces == [12, 12, 12]
    assert extent.later(0, 0) == 12
    assert extent.later(24, 0) == 12
    # Where the first step of a block computes the one before it, that is left to it.
    assert Extent(33, 64, 8, 4, 12, behind=4).reusable(0) == 28
    assert Extent(3, 64, 8, 4, 12, behind=4).reusable(0) == 0


@pytest.mark.parametrize(
    ("asked", "budget", "block", "piece"),
    [(0, 8192, 4, 2048), (0, 8192, 32, 2048), (100, 8192, 32, 96), (0, 64, 32, 96), (50, 8192, 4, 48)],
)
def test_a_piece_is_whole_blocks(asked: int, budget: int, block: int, piece: int) -> None:
    assert piece_length(asked, budget, block) == piece


@given(
    st.integers(1, 300), st.integers(1, 200), st.sampled_from([1, 4, 8, 32]), st.integers(0, 90), st.booleans(),
    st.integers(0, 200), st.integers(0, 9),
)  # fmt: skip
def test_pieces_are_whole_blocks_and_end_before_the_first_step(
    prompt: int, canvas: int, block: int, asked: int, shifted: bool, emitted: int, hit: int
) -> None:
    total = -(-(prompt + canvas) // block) * block
    budget = min(2 * block + 1, total)
    extent = Extent(prompt, total, budget, block, piece_length(asked, 64, block), block * shifted)
    emitted = min(emitted, canvas - 1)
    start = min(hit * block, extent.reusable(emitted))
    open_block = settled_positions(prompt, emitted, block)
    while (piece := extent.first(start, emitted)) < extent.known(emitted) - start:
        assert 0 < piece <= extent.later(start, emitted)
        start += piece
        assert start % block == 0
        assert start <= extent.reusable(emitted) <= open_block
    assert start + piece == extent.known(emitted) >= min(open_block + block, total)
    assert piece <= extent.later(start, emitted)
    # Later steps are extensions by their rows.
    assert extent.known(emitted) - extent.resumed_at(emitted) == min(budget, extent.known(emitted))
