"""The plain networks and loops of the block-diffusion families against logits and traces of the published code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from tests.reference.blocks import BLOCK_ORACLE, BlockModel, Forward, Loop, filtered, load_trace, trace_names
from tests.reference.fast_dllm_v2 import DenseFastDllmV2, FastDllmV2Loop
from tests.reference.llada2 import DenseLlada2, Llada20Loop, Llada21Loop
from tests.reference.sdar import DenseSdar, SdarLoop
from tests.reference.sdar_moe import DenseSdarMoe

MODELS: dict[str, type[BlockModel]] = {
    "llada2": DenseLlada2,
    "sdar": DenseSdar,
    "sdar_moe": DenseSdarMoe,
    "fast_dllm_v2": DenseFastDllmV2,
}
LOOPS: dict[str, type[Loop]] = {
    "llada2": Llada20Loop,
    "llada2.1": Llada21Loop,
    "sdar": SdarLoop,
    "sdar_moe": SdarLoop,
    "fast_dllm_v2": FastDllmV2Loop,
}
_FIELDS = ("kind", "block", "rows", "keys", "tokens_in", "in_block_step", "sub_block", "committed", "edited")


def difference(
    trace: dict[str, Any], spoil: Callable[[Loop], None] = lambda loop: None, network: Any = None
) -> str | None:
    """The first thing that a run does otherwise than the trace, or None.

    Args:
        spoil: is given the loop before it starts.
        network: what is run in place of the plain one; it has the same interface.
    """
    model = network or MODELS[trace["checkpoint"]](BLOCK_ORACLE / trace["checkpoint"])
    loop = LOOPS[trace["family"]](model, trace["prompt_ids"], trace["settings"])
    spoil(loop)
    wanted = iter(trace["steps"])
    for forward in loop.forwards():
        want = next(wanted, None)
        if want is None:
            return "more forwards than the trace"
        found = _step_difference(forward, want)
        if found:
            return f"forward {want['step']}: {found}"
    if next(wanted, None) is not None:
        return "fewer forwards than the trace"
    if loop.tokens != trace["final_tokens"]:
        return "other tokens at the end"
    return None if loop.output == trace["output_ids"] else "another output"


def _step_difference(forward: Forward, want: dict[str, Any]) -> str | None:
    for name in _FIELDS:
        found = getattr(forward, name)
        plain = [list(x) for x in found] if name in ("committed", "edited") else found
        if (list(plain) if isinstance(plain, tuple) else plain) != want.get(name, [] if plain == [] else None):
            return f"{name} is {plain}, not {want.get(name)}"
    if "confidence" not in want:
        return None
    assert forward.confidence is not None and forward.argmax is not None
    for i, (have, wish) in enumerate(zip(forward.confidence, want["confidence"], strict=True)):
        if (have is None) != (wish is None):
            return f"row {i} can be decided here or there alone"
        if have is not None and (abs(have - wish) > 2e-5 or forward.argmax[i] != want["argmax"][i]):
            return f"row {i}: token {forward.argmax[i]} at {have}, not {want['argmax'][i]} at {wish}"
    return None


def test_there_are_traces_of_all_families() -> None:
    families = [load_trace(name)["family"] for name in trace_names()]
    counts = {family: families.count(family) for family in LOOPS}
    assert counts == {"llada2": 8, "llada2.1": 7, "sdar": 9, "sdar_moe": 6, "fast_dllm_v2": 6}
    assert len(families) == sum(counts.values())


@pytest.mark.parametrize("name", trace_names())
def test_trace_is_reproduced_forward_by_forward(name: str) -> None:
    assert difference(load_trace(name)) is None


@pytest.mark.parametrize("family", MODELS)
def test_logits_are_those_of_the_published_network(family: str) -> None:
    golden = np.load(BLOCK_ORACLE / "golden" / f"{family}.npz")
    model, length = MODELS[family](BLOCK_ORACLE / family), int(golden["block_length"])
    ids = golden["prefill_ids"].tolist()
    model.reset(len(ids))
    np.testing.assert_allclose(model.store(ids, 0, length), golden["prefill_logits"], atol=2e-4)
    ids, start = golden["denoise_ids"].tolist(), len(golden["denoise_ids"]) - length
    model.reset(len(ids))
    model.store(ids[:start], 0, length)
    logits = model.rows(ids[start:], start, len(ids))
    np.testing.assert_allclose(logits, golden["denoise_logits"], atol=2e-4)
    temperature, top_k, top_p = golden["sampling_settings"].tolist()
    probabilities = filtered(logits.clone(), temperature, int(top_k), top_p)
    np.testing.assert_allclose(probabilities, golden["sampling_probabilities"], atol=2e-5)


@pytest.mark.parametrize("family", MODELS)
def test_a_chunk_of_several_blocks_is_their_blocks_one_by_one(family: str) -> None:
    """Rows that see more than their block and those before get other logits; that is what the cut is for."""
    golden = np.load(BLOCK_ORACLE / "golden" / f"{family}.npz")
    model, length = MODELS[family](BLOCK_ORACLE / family), int(golden["block_length"])
    ids = golden["prefill_ids"].tolist()
    model.reset(len(ids))
    model.store(ids[: 2 * length], 0, length)
    torch.testing.assert_close(
        model.store(ids[2 * length :], 2 * length, length),
        torch.from_numpy(golden["prefill_logits"])[2 * length :],
        atol=2e-4,
        rtol=0,
    )
    model.reset(len(ids))
    cut = model.rows(ids, 0, len(ids))
    assert (cut - torch.from_numpy(golden["prefill_logits"])).abs().max() > 1
