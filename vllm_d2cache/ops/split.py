"""How attention and maps of a step with few rows are cut, so that a card has work for all its processors.

Keys are added up in stretches, heads in groups. What a part comes to, and the order in which parts are put together,
depend on a request's own length and on the model's shape: it does not matter which program does which. So whether a
step is cut may go by the batch. The kernels (ops/triton/attention.py, maps.py) read these numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

# A stretch has STRETCH keys, or a multiple of it where a request would have more than MOST_STRETCHES.
STRETCH, MOST_STRETCHES = 256, 8
# Heads that a program of the map adds up, at least; those that share keys are not parted.
_HEADS_AT_ONCE = 4
# Rows and keys of a tile in 16 bits; in fp32 tiles are smaller, and so is what is cut.
TILE = (32, 64)
# With as many programs as this there is no need to cut further: an H100 holds some 400 at a time.
ENOUGH = 512

_forced: bool | None = None


def is_cut(programs: int, parts: int) -> bool:
    """Whether a step is cut into so many parts that has so many programs without."""
    return parts > 1 and programs < ENOUGH if _forced is None else _forced


@contextmanager
def forced(cut: bool) -> Iterator[None]:
    """Have every step be cut, or none, whatever its size: the results are the same."""
    global _forced
    before, _forced = _forced, cut
    try:
        yield
    finally:
        _forced = before


def num_stretches(length: int) -> int:
    """Stretches of a request with ``length`` keys."""
    return -(-length // (STRETCH * max(1, -(-length // (STRETCH * MOST_STRETCHES)))))


def most_stretches(length: int) -> int:
    """Stretches that requests of up to ``length`` keys can have."""
    return min(MOST_STRETCHES, -(-length // STRETCH))


def kv_heads_at_once(heads: int, kv_heads: int) -> int:
    """Of a group of heads whose maps are added up by one program."""
    return max(1, _HEADS_AT_ONCE // (heads // kv_heads))


def parts_bytes(heads: int, head_size: int, max_length: int) -> int:
    """Bytes that the parts of a layer take at most before they are put together: attention's, or then the map's.

    Args:
        max_length: most positions of a request.
    """
    pairs, tile_keys = ENOUGH * TILE[0], TILE[1]  # (row, head) pairs of a step that is cut
    attention = most_stretches(max_length) * pairs * (head_size + 2)
    rows = min(ENOUGH, ENOUGH * tile_keys // max_length + 1) * TILE[0]
    groups = -(-heads // _HEADS_AT_ONCE)
    return 4 * max(attention, groups * rows * max_length)
