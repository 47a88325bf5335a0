"""Decoders inside the engine: a batch that mixes all of them gives what each request gives alone."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.e2e.conftest import Engine, assert_same, runner_of
from tests.reference.oracle import ORACLE
from vllm_d2cache.decoders import DECODER_CLASSES

pytestmark = [pytest.mark.vllm, pytest.mark.engine]

# Rules loose enough that the random checkpoint commits several tokens in some steps.
DECODERS: dict[str, dict[str, Any]] = {
    "confidence": {"threshold": 0.4, "steps": 12, "window": 0},
    "eb": {"gamma": 1.5},
    "klass": {"kl_threshold": 0.5, "threshold": 0.3},
    "pc": {"tokens_per_step": 2},
    "credit": {"threshold": 0.6},
    "hierarchical": {"threshold": 0.7, "low_threshold": 0.3, "window": 12},
    "localleap": {"threshold": 0.7, "leap_threshold": 0.4},
    "wino": {"wide_in_thres": 0.3, "narrow_out_thres": 0.6, "window": 16},
}


def requests() -> list[dict[str, Any]]:
    """Each decoder under both policies, greedy and sampled, on prompts of many lengths."""
    made = []
    for i, (decoder, options) in enumerate(DECODERS.items()):
        for policy in ("full",) if decoder == "wino" else ("d2cache", "full"):
            sampling = {"temperature": 0.8, "seed": i} if (i + len(policy)) % 3 == 0 else {}
            prompt = [(11 * j + 7 * i + len(policy)) % 360 for j in range(3 + 17 * i)]
            made.append(
                {
                    "prompt": prompt,
                    "max_tokens": 24 + 3 * i,
                    "sampling": sampling,
                    "options": {"decoder": decoder, "policy": policy, **options},
                }
            )
    return made


def test_every_decoder_is_tried() -> None:
    # The two of texts in blocks: test_block_families.py.
    assert set(DECODERS) == set(DECODER_CLASSES) - {"edit", "sequential"}


def test_mixed_decoders_in_one_batch(engine: Engine) -> None:
    made = requests()
    alone = [engine.run([request])[0] for request in made]
    assert_same(engine.run(made), alone)
    several = {r["options"]["decoder"] for r, (_, t) in zip(made, alone, strict=True) if _commits_several(t)}
    assert several == set(DECODERS), "every rule committed more than one token in some step"


def _commits_several(trace: list[dict[str, Any]]) -> bool:
    return any(len(line["committed"]) > 1 for line in trace[1:-1])


def test_nobody_pays_for_a_decoder_that_is_not_used(engine: Engine) -> None:
    """The LM head runs once for each predicted row, twice for those of klass, and for what wino verifies."""
    model, rows = runner_of(engine).model, []
    stock = model.lm_logits

    def lm_logits(hidden: Any) -> Any:
        rows.append(hidden.shape[0])
        return stock(hidden)

    def count(decoder: str) -> tuple[int, int]:
        rows.clear()
        options = {"decoder": decoder, "policy": "full", "window": 0, "sigma": 0}
        ((_, trace),) = engine.run([{"prompt": [1, 2, 3], "max_tokens": 20, "options": options}])
        lines = trace[1:-1]
        masked = [20] + [line["masked_left"] for line in lines[:-1]]
        verified = 20 * len(lines) - sum(masked)
        return sum(rows), {"klass": 2 * sum(masked), "wino": sum(masked) + verified}.get(decoder, sum(masked))

    model.lm_logits = lm_logits
    try:
        for decoder in DECODERS:
            head, wanted = count(decoder)
            assert head == wanted, decoder
    finally:
        model.lm_logits = stock


def test_wino_trace(engine: Engine) -> None:
    """The published implementation with one repair (D4); there, what is taken back is a transfer of the mask token."""
    raw = json.loads((ORACLE / "traces" / "llada.winofix_semi16.json").read_text())
    kwargs = raw["generate_kwargs"]
    options = {
        "decoder": "wino",
        "policy": "full",
        "sigma": 0,
        "window": kwargs["block_length"],
        "wide_in_thres": kwargs["wide_in_thres"],
        "narrow_out_thres": kwargs["narrow_out_thres"],
    }
    prompt, mask = raw["input_ids"][0], raw["mask_token_id"]
    ((tokens, trace),) = engine.run([{"prompt": prompt, "max_tokens": kwargs["gen_length"], "options": options}])
    for number, (line, want) in enumerate(zip(trace[1:-1], raw["steps"], strict=True)):
        moves = want["transfer"][0]
        got = [*map(tuple, line["committed"]), *((slot, mask) for slot in line.get("revoked", []))]
        assert sorted(got) == sorted(zip(moves["positions"], moves["tokens"], strict=True)), f"step {number}"
    assert tokens == raw["final_tokens"][0]


def test_shadows_beside_policies_that_change_layers(engine: Engine) -> None:
    """Mates whose layers skip rows or hide keys neither see the shadows nor move them."""
    options = [
        {"decoder": "wino", "policy": "full", **DECODERS["wino"]},
        {"policy": "dllm_cache", "kp": 7, "kr": 3, "rou": 0.3, "window": 8},
        {"policy": "sparse_dllm", "window": 8, "keep_ratio": 0.3},
        {"current_k": 4},
        {"decoder": "wino", "policy": "full", "wide_in_thres": 0.02, "narrow_out_thres": 0.3, "window": 8},
    ]
    made = [{"prompt": [5 + 3 * i, 7] * (4 + 9 * i), "max_tokens": 24, "options": o} for i, o in enumerate(options)]
    alone = [engine.run([request])[0] for request in made]
    assert_same(engine.run(made), alone)
    for _, trace in (alone[0], alone[4]):
        assert any("shadows" in line for line in trace[1:-1])


def test_wino_needs_room_for_its_shadows(engine: Engine) -> None:
    from vllm.exceptions import VLLMValidationError

    request = {"prompt": [1] * 4000, "max_tokens": 90, "options": {"decoder": "wino", "policy": "full", "window": 16}}
    with pytest.raises(VLLMValidationError, match="needs 16 positions"):
        engine.run([request])
    ((tokens, _),) = engine.run([{**request, "max_tokens": 80}])
    assert len(tokens) == 80
