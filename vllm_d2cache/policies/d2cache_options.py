"""What a request may set of d2Cache, wherever it runs."""

from __future__ import annotations

from collections.abc import Mapping

from vllm_d2cache.options.types import Choice, Number

FIRST, LATEST = MEMORIES = ("first", "latest")

OPTIONS: Mapping[str, Number | Choice] = {
    "selection_sigma": Number(float, 0, note="positions; 0 = rank by confidence alone", default=10.0),
    "current_k": Number(int, 1, note="masked positions", default=32),
    "rollout_p": Number(float, 0, 1, note="share of the rollout's mass", default=0.1),
    "inflate_w": Number(int, 0, note="positions; 0 = off", default=0),
    "confidence_memory": Choice(MEMORIES, default=FIRST),
}
