"""Prompts in pieces and prefixes that are found again, for families whose rows see their own block and those before it.

What is stored of such a text never changes (canvas/extent.py).
"""

from __future__ import annotations

from math import lcm
from typing import TYPE_CHECKING

from vllm_d2cache.canvas.extent import piece_length
from vllm_d2cache.engine.changes import log_change
from vllm_d2cache.options.server import ServerOptions

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def configure_pieces(config: VllmConfig, options: ServerOptions) -> dict[str, int]:
    """Fit the configuration; returns the server options that follow, none where a row sees all positions.

    vLLM may build a configuration again from one that has been here: what it says then is ours.
    """
    block, scheduler = options.block_length, config.scheduler_config
    if not block:
        return {}
    _pages_of_whole_blocks(config, block)
    if not scheduler.enable_chunked_prefill:
        return {"prefill_piece": 0}
    asked = scheduler.long_prefill_token_threshold or options.prefill_piece
    scheduler.long_prefill_token_threshold = 0
    piece = piece_length(asked, scheduler.max_num_batched_tokens, block)
    if asked and piece != asked:
        log_change(f"long_prefill_token_threshold is {piece}, not {asked}", f"whole blocks of {block}, three or more")
    if scheduler.max_num_batched_tokens < piece:
        change = f"max_num_batched_tokens is {piece}, not {scheduler.max_num_batched_tokens}"
        log_change(change, f"a step of one request can have two blocks of {block}, and some room")
        scheduler.max_num_batched_tokens = piece
    return {"prefill_piece": piece}


def _pages_of_whole_blocks(config: VllmConfig, block: int) -> None:
    """A prefix is found again by its pages, and is one only where it ends with a block."""
    cache = config.cache_config
    if not cache.enable_prefix_caching or cache.block_size % block == 0:
        return
    size = lcm(cache.block_size, block)
    if cache.user_specified_block_size:
        log_change("prefix caching is off", f"--block-size {cache.block_size}: with this model a multiple of {block}")
        cache.enable_prefix_caching = False
        return
    log_change(f"block_size is {size}, not {cache.block_size}", f"pages of whole blocks of {block}, for prefix caching")
    cache.block_size, cache.user_specified_block_size = size, True
