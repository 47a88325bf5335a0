"""The traces of the block-diffusion families notice mistakes: each one is made here, and some trace must differ.

That is of the plain networks and loops. The same mistake in the package is found by the tests of:

- rotary over the whole head, experts (bias, groups, scores, scale, shared, weights), norms and biases of q, k, v:
  tests/vllm/test_block_networks.py, by logits and traces
- causal or bidirectional prompt, causal block, K and V of the last denoising step, threshold, edits and their limit,
  rows read without the shift, sub-blocks, block cache, the first token of a block:
  tests/unit/step/test_block_traces.py, through the StepRunner
- a share of a window with a remainder, which no trace has: tests/unit/decoders/test_schedule.py
- a piece of a prompt that cuts a block: tests/unit/canvas/test_extent.py; positions of a piece: test_block_traces.py
- end tokens ignored: tests/e2e/test_block_families.py (the scheduler ends requests)
- the mask token committed: tests/ops/test_row_stats.py
- an edited prompt cannot come about: edits are of canvas slots
"""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

import pytest
import torch

from tests.reference.blocks import BlockModel, Loop, load_trace, trace_names
from tests.reference.llada2 import DenseLlada2, Llada21Loop
from tests.unit.models.test_block_oracle import difference

Spoil = Callable[[Loop], None]
MIXTURES = ("llada2", "llada2.1")
STORING = ("sdar", "sdar_moe", "fast_dllm_v2")
ALL = (*MIXTURES, *STORING)


def config(**changes: Any) -> Spoil:
    """Other values in config.json."""

    def spoil(loop: Loop) -> None:
        loop.model.config |= changes

    return spoil


def settings(**changes: Any) -> Spoil:
    """Other settings."""
    return lambda loop: loop.settings.update(changes)


def without(*endings: str) -> Spoil:
    """Tensors that are not there."""

    def spoil(loop: Loop) -> None:
        loop.model.w = {name: w for name, w in loop.model.w.items() if not name.endswith(endings)}

    return spoil


def zeroed(ending: str) -> Spoil:
    """Tensors of zeros."""

    def spoil(loop: Loop) -> None:
        for name, tensor in loop.model.w.items():
            if name.endswith(ending):
                tensor.zero_()

    return spoil


def method(name: str, function: Callable[..., Any], of_model: bool = True) -> Spoil:
    """Another method. ``function`` is given what it replaces before the method's own arguments."""

    def spoil(loop: Loop) -> None:
        owner = loop.model if of_model else loop
        replaced = getattr(owner, name)
        setattr(owner, name, MethodType(lambda self, *args: function(replaced, self, *args), owner))

    return spoil


# --- the network ------------------------------------------------------------------------------------------------------


def rotate_whole_heads(loop: Loop) -> None:
    assert isinstance(loop.model, DenseLlada2)
    loop.model.rotated = loop.model.head_dim


def weigh_with_bias(route: Any, model: DenseLlada2, logits: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    score = model.scores(logits) + bias
    chosen = route(logits, bias) > 0
    return torch.where(chosen, score / score[chosen].sum() * model.config["routed_scaling_factor"], 0.0)


def weigh_without_sum(route: Any, model: BlockModel, logits: torch.Tensor) -> torch.Tensor:
    return torch.where(route(logits) > 0, logits.softmax(-1), 0.0)


# --- what rows see ----------------------------------------------------------------------------------------------------


def one_by_one(rows: Any, model: BlockModel, tokens: list[int], first: int, keys: int) -> torch.Tensor:
    """Causal: a row sees the rows before it."""
    return torch.cat([rows([token], first + i, first + i + 1) for i, token in enumerate(tokens)])


def causal_prompt(store: Any, loop: Loop) -> torch.Tensor | None:
    end = loop.prompt // loop.length * loop.length
    return one_by_one(loop.model.rows, loop.model, loop.tokens[:end], 0, end) if end else None


def bidirectional_prompt(store: Any, loop: Loop) -> torch.Tensor | None:
    end = loop.prompt // loop.length * loop.length
    return loop.model.rows(loop.tokens[:end], 0, end) if end else None


def causal_block(denoise: Any, loop: Loop, *args: Any) -> Any:
    rows = loop.model.rows
    loop.model.rows = MethodType(lambda model, *of: one_by_one(rows, model, *of), loop.model)
    try:
        return denoise(*args)
    finally:
        loop.model.rows = rows


def causal_blocks(loop: Loop) -> None:
    name = "denoised" if hasattr(loop, "denoised") else "denoise"
    method(name, causal_block, of_model=False)(loop)


def keep_last_denoising(store: Any, loop: Loop, start: int, end: int) -> torch.Tensor:
    """The block's K and V stay those of its last denoising forward."""
    kept = [t.clone() for t in (*loop.model.keys, *loop.model.values)]
    logits = store(start, end)
    for tensor, old in zip((*loop.model.keys, *loop.model.values), kept, strict=True):
        tensor.copy_(old)
    return logits


def shifted_positions(loop: Loop) -> None:
    """The answer's rows are rotated one too far."""
    behind = loop.prompt // loop.length * loop.length
    method("_rope", lambda rope, model, x, at: rope(x, at + (at >= behind)))(loop)


# --- what is committed ------------------------------------------------------------------------------------------------


def raised_threshold(loop: Loop) -> None:
    loop.settings["threshold"] += 0.05


def edit_prompt(editable: Any, loop: Loop, start: int, end: int, masked: list[int]) -> list[int]:
    return [i for i in range(start, end) if i not in masked]


def edit_late(editable: Any, loop: Llada21Loop, start: int, end: int, masked: list[int]) -> list[int]:
    return [] if masked else editable(start, end, masked)


def ignore_stops(loop: Loop) -> None:
    loop.eos = []


def one_sub_block(loop: Loop) -> None:
    loop.settings["small_block_length"] = loop.length


MISTAKES: dict[str, tuple[tuple[str, ...], Spoil]] = {
    "rotary over the whole head": (MIXTURES, rotate_whole_heads),
    "expert bias ignored": (MIXTURES, zeroed("router.bias")),
    "weights with bias": (MIXTURES, method("route", weigh_with_bias)),
    "groups ignored": (MIXTURES, config(n_group=1, topk_group=1)),
    "softmax router": (MIXTURES, method("scores", lambda scores, model, logits: logits.softmax(-1))),
    "no scaling": (MIXTURES, config(routed_scaling_factor=1.0)),
    "no shared expert": (MIXTURES, zeroed("shared.down")),
    "no q/k norm": ((*MIXTURES, "sdar", "sdar_moe"), without("qnorm", "knorm")),
    "not renormalised": (("sdar_moe",), method("route", weigh_without_sum)),
    "no q/k/v bias": (("fast_dllm_v2",), without(".bias")),
    "causal prompt": (ALL, method("prefill", causal_prompt, of_model=False)),
    "bidirectional prompt": (ALL, method("prefill", bidirectional_prompt, of_model=False)),
    "causal inside the block": (ALL, causal_blocks),
    "K, V of the last denoising step kept": (ALL, method("store", keep_last_denoising, of_model=False)),
    "threshold + 0.05": (ALL, raised_threshold),
    "no editing": (("llada2.1",), settings(editing_threshold=2.0)),
    "prompt tail edited": (("llada2.1",), method("editable", edit_prompt, of_model=False)),
    "no edit limit": (("llada2.1",), settings(max_post_steps=100)),
    "edits only after the last mask": (("llada2.1",), method("editable", edit_late, of_model=False)),
    "end tokens ignored": (ALL, ignore_stops),
    "no shift": (("fast_dllm_v2",), method("shifted", lambda shifted, loop, logits: logits, of_model=False)),
    "no sub-blocks": (("fast_dllm_v2",), one_sub_block),
    "no block cache": (("fast_dllm_v2",), settings(use_block_cache=False)),
    "a block's first token is not from the store": (
        ("fast_dllm_v2",),
        method("next_token", lambda next_token, loop, logits: [], of_model=False),
    ),
    "positions off by one behind the prompt": (ALL, shifted_positions),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_traces_notice(mistake: str) -> None:
    families, spoil = MISTAKES[mistake]
    traces = [load_trace(name) for name in trace_names()]
    for family in families:
        concerned = [trace for trace in traces if trace["family"] == family]
        found = [difference(trace, spoil) for trace in concerned]
        assert any(found), f"{family}: no trace notices"


def test_forwards_are_compared_in_all_fields() -> None:
    """``difference`` must not be blind: a step that reports something else is found."""
    for name in ("kind", "block", "rows", "keys", "tokens_in", "committed"):
        changed = load_trace("sdar.static_b4")
        changed["steps"][1][name] = "commit" if name == "kind" else [[99, 99]]
        found = difference(changed)
        assert found is not None and name in found
