"""Full recompute where texts are cut into blocks: all that can change, which is the block being written."""

from __future__ import annotations

from vllm_d2cache.policies.open_block import OpenBlockPolicy


class FullInBlocks(OpenBlockPolicy):
    """Recomputes all of the open block in every step, and reads no option: the yardstick there.

    What is stored of finished blocks is exact; recomputing it would give the same numbers.
    """

    name = "full"
    takes_all_options = True
