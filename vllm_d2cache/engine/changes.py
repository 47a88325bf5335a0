"""Defaults of vLLM that are others here, said in the log."""

from __future__ import annotations

from vllm.logger import init_logger

logger = init_logger(f"vllm.{__name__}")  # vLLM shows what is logged below its own name


def log_change(change: str, reason: str) -> None:
    """Say that a default is another one, and why."""
    logger.info("vllm-d2cache changed a default: %s (%s)", change, reason)
