"""Request fields beyond tokens and options, through the engine: log-probabilities, logit edits, infilling."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.e2e.conftest import Engine, runner_of
from tests.reference.llada import DenseLlada
from tests.reference.oracle import ORACLE

pytestmark = [pytest.mark.vllm, pytest.mark.engine]

MASK, EOS = 370, 371
PROMPT = [7, 20, 33, 46, 59, 72]


def generate(engine: Engine, requests: list[dict[str, Any]]) -> list[Any]:
    """vLLM's RequestOutput of each request: prompt, max_tokens, sampling fields, ``options`` by plain name."""
    from vllm import SamplingParams

    params = [
        SamplingParams(
            **{"temperature": 0.0, "ignore_eos": True, "max_tokens": 16, **r.get("sampling", {})},
            detokenize=False,
            extra_args={f"d2cache_{k}": v for k, v in r.get("options", {}).items()},
        )
        for r in requests
    ]
    prompts = [{"prompt_token_ids": r.get("prompt", PROMPT)} for r in requests]
    return engine.llm.generate(prompts, params, use_tqdm=False)


def one(engine: Engine, **request: Any) -> list[int]:
    return list(generate(engine, [request])[0].outputs[0].token_ids)


def values(output: Any) -> list[dict[int, float]]:
    """Each token's log-probabilities by token id."""
    return [{token: entry.logprob for token, entry in place.items()} for place in output.outputs[0].logprobs]


@pytest.mark.parametrize(
    "options",
    [
        {"window": 8},
        {"threshold": 0.02, "window": 16},
        {"decoder": "wino", "window": 8, "wide_in_thres": 0.02, "narrow_out_thres": 0.5},
    ],
    ids=["one", "many", "taken back"],
)
def test_logprobs_are_those_of_the_step_that_committed(engine: Engine, options: dict[str, Any]) -> None:
    """Against a dense model run on the canvas as it stood before each step of the trace."""
    request = {"options": {"policy": "full", **options}, "sampling": {"logprobs": 3}}
    (output,) = generate(engine, [request])
    model = DenseLlada(ORACLE / "llada")
    canvas = [MASK] * 16
    want: dict[int, torch.Tensor] = {}
    for line in engine.trace(output.request_id)[1:-1]:
        ids = torch.tensor(PROMPT + canvas)
        model.reset(len(ids))
        hidden, _ = model.forward(ids, torch.arange(len(ids)))
        logprobs = model.lm_head(hidden).log_softmax(-1)
        for slot, token in line["committed"]:
            want[slot] = logprobs[len(PROMPT) + slot]
            canvas[slot] = token
        for slot in line.get("revoked", []):
            canvas[slot] = MASK
    got = output.outputs[0]
    assert list(got.token_ids) == canvas
    assert got.cumulative_logprob == pytest.approx(sum(float(want[s][t]) for s, t in enumerate(canvas)), abs=1e-3)
    for slot, place in enumerate(got.logprobs):
        assert {canvas[slot], *want[slot].topk(3).indices.tolist()} == set(place)
        for token, entry in place.items():
            assert entry.logprob == pytest.approx(float(want[slot][token]), abs=1e-4)
            assert entry.rank == int((want[slot] >= want[slot][token]).sum())


def test_logprobs_belong_to_their_request(engine: Engine) -> None:
    """Mates that ask for more, less and nothing."""
    counts = [3, None, 0, 5, 1, None, 2, 3]
    requests = [
        {
            "prompt": [5 + i] * (3 + 40 * (i % 2)),
            "sampling": {"logprobs": count, "max_tokens": 8 + 5 * i, "temperature": 0.7 * (i % 3), "seed": i},
            "options": {"threshold": 0.2} if i % 2 else {"window": 6},
        }
        for i, count in enumerate(counts)
    ]
    together = generate(engine, requests)
    for request, count, output in zip(requests, counts, together, strict=True):
        (alone,) = generate(engine, [request])
        assert alone.outputs[0].token_ids == output.outputs[0].token_ids
        if count is None:
            assert output.outputs[0].logprobs is None
            continue
        assert len(output.outputs[0].logprobs) == len(output.outputs[0].token_ids)
        for got, want, token in zip(values(output), values(alone), output.outputs[0].token_ids, strict=True):
            assert token in got
            assert got == pytest.approx(want, abs=1e-5)


def test_n_samples_have_their_own_logprobs(engine: Engine) -> None:
    request = {"sampling": {"n": 3, "temperature": 1.0, "seed": 4, "logprobs": 0}}
    (output,) = generate(engine, [request])
    samples = output.outputs
    assert len({tuple(s.token_ids) for s in samples}) == 3
    for sample in samples:
        assert [list(place) for place in sample.logprobs] == [[t] for t in sample.token_ids]
        assert sample.cumulative_logprob == pytest.approx(sum(p[t].logprob for p, t in zip(
            sample.logprobs, sample.token_ids, strict=True)))  # fmt: skip


def test_edits_are_honoured_and_reach_no_mate(engine: Engine) -> None:
    plain = one(engine)
    favourite = max(set(plain), key=plain.count)
    edits: list[dict[str, Any]] = [
        {},
        {"allowed_token_ids": [3, 4, 5]},
        {"logit_bias": {9: 100.0}},
        {"logit_bias": {9: 100.0}, "min_tokens": 5, "stop_token_ids": [9], "ignore_eos": False},
        {"presence_penalty": 2.0, "logit_bias": {11: 40.0}},
        {"logit_bias": {favourite: -100.0}},
        {"repetition_penalty": 1.8, "frequency_penalty": 1.0},
        {},
    ]
    together = generate(engine, [{"sampling": edit} for edit in edits])
    outputs = [list(output.outputs[0].token_ids) for output in together]
    assert [one(engine, sampling=edit) for edit in edits] == outputs
    assert outputs[0] == outputs[7] == plain
    assert set(outputs[1]) <= {3, 4, 5}
    assert outputs[2] == [9] * 16
    assert 9 not in outputs[3][:5]
    assert outputs[3][5:] == [9]
    assert together[3].outputs[0].finish_reason == "stop"
    assert favourite not in outputs[5]
    assert len(set(outputs[6])) > len(set(plain))


def test_penalties_count_tokens_wherever_they_stand(engine: Engine) -> None:
    """A bias of 50 for one token, 2 less for each time it has been written: 16 times is not enough to be beaten."""
    base = {"logit_bias": {11: 50.0}}
    assert one(engine, sampling={**base, "frequency_penalty": 2.0}) == [11] * 16
    # A bias that the presence penalty alone takes back.
    (output,) = generate(engine, [{"sampling": {"logprobs": 0}}])
    assert one(engine, sampling={"logit_bias": {11: 100.0}, "presence_penalty": 2.0}) == [11] * 16
    assert len(output.outputs[0].token_ids) == 16


@pytest.mark.parametrize("options", [{}, {"policy": "full"}, {"window": 4, "threshold": 0.1}])
def test_infilling_keeps_what_is_given(engine: Engine, options: dict[str, Any]) -> None:
    canvas = [-1, 5, 6, -1, -1, -1, 300, -1, -1, 8, 9, 10]
    got = generate(
        engine, [{"options": {"canvas": canvas, **options}, "sampling": {"max_tokens": 12, "logprobs": 1}}, {}]
    )
    tokens = list(got[0].outputs[0].token_ids)
    assert len(tokens) == 12
    assert all(want in (-1, t) for want, t in zip(canvas, tokens, strict=True))
    assert MASK not in tokens
    assert list(got[1].outputs[0].token_ids) == one(engine)
    assert values(got[0])[1] == {5: 0.0}


def test_infilling_reads_what_is_given_on_both_sides(engine: Engine) -> None:
    """The one hole of a dense model's forward pass."""
    canvas = [9, 10, 11, -1, 12, 13]
    tokens = one(engine, options={"canvas": canvas}, sampling={"max_tokens": 6})
    model = DenseLlada(ORACLE / "llada")
    ids = torch.tensor(PROMPT + [MASK if t < 0 else t for t in canvas])
    model.reset(len(ids))
    logits = model.lm_head(model.forward(ids, torch.arange(len(ids)))[0])[len(PROMPT) + 3]
    logits[MASK] = -torch.inf
    assert tokens == [9, 10, 11, int(logits.argmax()), 12, 13]


def test_a_given_stop_token_ends_the_request(engine: Engine) -> None:
    canvas = [-1, -1, -1, 9, -1, -1]
    got = generate(engine, [{"options": {"canvas": canvas}, "sampling": {"max_tokens": 6, "stop_token_ids": [9]}}])
    tokens = list(got[0].outputs[0].token_ids)
    assert tokens[-1] == 9
    assert len(tokens) <= 4
    assert got[0].outputs[0].finish_reason == "stop"


@pytest.mark.parametrize(
    ("sampling", "options", "named"),
    [
        ({"prompt_logprobs": 1}, {}, "prompt_logprobs"),
        ({"logprobs": 2, "logprob_token_ids": [1, 2]}, {}, "logprob_token_ids"),
        ({"allowed_token_ids": [MASK]}, {}, "allowed_token_ids"),
        ({"max_tokens": 5}, {"canvas": [-1, 2]}, "max_tokens: must be the length of d2cache_canvas, 2"),
        ({"max_tokens": 2}, {"canvas": [-1, MASK]}, "d2cache_canvas"),
        ({"max_tokens": 2}, {"canvas": [-1, 384]}, "d2cache_canvas"),
        ({"bad_words": ["x"]}, {}, "bad_words: needs a tokenizer"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(
    engine: Engine, sampling: dict[str, Any], options: dict[str, Any], named: str
) -> None:
    from vllm.exceptions import VLLMValidationError

    with pytest.raises(VLLMValidationError, match=named):
        generate(engine, [{"sampling": sampling, "options": options}])
    assert one(engine, sampling={"max_tokens": 3})


def test_beam_search_is_refused(engine: Engine) -> None:
    from vllm.exceptions import VLLMValidationError
    from vllm.sampling_params import BeamSearchParams

    with pytest.raises(VLLMValidationError, match="use_beam_search"):
        engine.llm.beam_search([{"prompt_token_ids": PROMPT}], BeamSearchParams(beam_width=2, max_tokens=4))


def test_a_report_of_what_a_request_cost(engine: Engine) -> None:
    wino = {"decoder": "wino", "policy": "full", "window": 8, "wide_in_thres": 0.02, "narrow_out_thres": 0.5}
    options = [{"report": True, "window": 8}, {}, {"report": 1, "policy": "full"}, {"report": 1, **wino}]
    got = generate(engine, [{"options": o} for o in options])
    cached, silent, full, verified = (
        output.kv_transfer_params["d2cache"] if o else output.kv_transfer_params
        for o, output in zip(options, got, strict=True)
    )
    assert silent is None
    rows = 16 * (len(PROMPT) + 16)
    assert full == {
        "policy": "full",
        "steps": 16,
        "tokens": 16,
        "tokens_per_step": 1.0,
        "rows_refreshed": rows,
        "rows_saved": 0,
        "saved_share": 0.0,
    }
    lines = engine.trace(got[0].request_id)[1:-1]
    computed = sum(len(PROMPT) + 16 if line["refreshed"] is None else len(line["refreshed"]) for line in lines)
    assert cached["rows_refreshed"] == computed
    assert cached["rows_saved"] == rows - computed
    lines = engine.trace(got[3].request_id)[1:-1]
    shadows = sum(line.get("shadows", 0) for line in lines)
    assert shadows > 0
    assert verified["rows_refreshed"] == len(lines) * (len(PROMPT) + 16) + shadows
    assert (verified["rows_saved"], verified["saved_share"]) == (0, 0.0)


def test_snapshots_are_refused_where_no_stream_is(engine: Engine) -> None:
    from vllm.exceptions import VLLMValidationError

    with pytest.raises(VLLMValidationError, match="d2cache_snapshots: comes with a completion or chat completion"):
        generate(engine, [{"options": {"snapshots": 1}}])
    assert not runner_of(engine).model_state.watched
