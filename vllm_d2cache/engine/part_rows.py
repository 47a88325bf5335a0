"""How many rows a layer computes at a time: what ``--max-num-batched-tokens`` says.

A step may have more, as a request's first step has all of its positions; layers then compute them in parts
(TransformerLayer in models/common.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_d2cache.engine.changes import log_change
from vllm_d2cache.options.request import SECTION
from vllm_d2cache.options.server import ServerOptions
from vllm_d2cache.requests.resolve import server_options

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def part_rows(config: VllmConfig) -> int:
    """Most rows that a layer computes at a time."""
    most = config.scheduler_config.max_num_batched_tokens
    return min(server_options(config).part_rows or most, most)


def configure_parts(config: VllmConfig, options: ServerOptions, chosen: int) -> dict[str, int]:
    """The server options that follow, none where a layer computes all rows of a step at a time.

    vLLM may build a configuration again from one that has been here: what it says then is ours.

    Args:
        chosen: max_num_batched_tokens as it was before it was fitted to first steps.

    Raises:
        ValueError: the operator wants parts where there can be none.
    """
    most = config.scheduler_config.max_num_batched_tokens
    reason = _at_once(config)
    if options.part_rows is not None:
        if reason:
            raise ValueError(f'additional_config["{SECTION}"]["part_rows"]: leave it out; {reason}')
        return {}
    if chosen >= most:
        return {}
    if reason:
        log_change(f"layers compute all {most} rows of a step at a time, not {chosen}", reason)
        return {}
    return {"part_rows": chosen}


def _at_once(config: VllmConfig) -> str | None:
    """Why layers must compute all rows of a step at a time; None = they need not."""
    if config.lora_config is not None:
        return "--enable-lora: adapters are laid out for all rows of a step"
    return None
