"""Canvases given in part: fixed tokens never change, holes are filled, and both are emitted in place."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.batches import MASK, VOCAB, Batch, FakeJob, run_alone
from tests.unit.strategies import jobs
from vllm_d2cache.canvas.request import SamplingSpec
from vllm_d2cache.options.types import OptionError
from vllm_d2cache.requests.asked import Asked
from vllm_d2cache.requests.fit import check_fit
from vllm_d2cache.requests.resolve import parse_request_options

_tokens = st.sampled_from([-1, -1, *(t for t in range(VOCAB) if t != MASK)])


@st.composite
def infills(draw: st.DrawFn, stops: bool = False) -> FakeJob:
    job = draw(jobs(stops=stops))
    given = draw(st.lists(_tokens, min_size=job.canvas_length, max_size=job.canvas_length))
    given[draw(st.integers(0, job.canvas_length - 1))] = -1
    return replace(job, given=tuple(given))


@given(infills())
def test_fixed_tokens_stay_and_holes_are_filled(job: FakeJob) -> None:
    done = run_alone(job)
    assert len(done.output) == job.canvas_length
    assert all(want in (-1, got) for want, got in zip(job.given, done.output, strict=True))
    committed = [slot for step in done.steps for slot, _ in step.committed]
    assert sorted(committed) == [slot for slot, token in enumerate(job.given) if token < 0]
    assert MASK not in done.output


@given(infills())
def test_a_fixed_beginning_is_emitted_in_the_first_step(job: FakeJob) -> None:
    done = run_alone(job)
    beginning = next(i for i, t in enumerate(job.given) if t < 0)
    assert tuple(done.steps[0].emitted[:beginning]) == job.given[:beginning]


@given(infills(stops=True))
def test_nothing_is_written_behind_a_fixed_stop_token(job: FakeJob) -> None:
    stops = set(job.sampling.stop_token_ids)
    end = next((i for i, t in enumerate(job.given) if t in stops), job.canvas_length)
    done = run_alone(job)
    assert all(slot < end for step in done.steps for slot, _ in step.committed)


@given(st.lists(st.one_of(infills(stops=True), jobs(stops=True)), min_size=2, max_size=4))
def test_mates_change_nothing(together: list[FakeJob]) -> None:
    together = [job.fresh() for job in together]
    Batch(together).run()
    for job in together:
        assert run_alone(job).steps == job.steps


def test_a_fixed_token_is_certain_and_has_no_alternatives() -> None:
    job = FakeJob([1, 2], 4, given=(3, -1, 7, -1), sampling=SamplingSpec(num_logprobs=2))
    done = run_alone(job)
    for slot, token in ((0, 3), (2, 7)):
        assert done.logprobs[slot] == ([token] * 3, [0.0] * 3, 1)
    assert done.logprobs[1][1][0] < 0


def test_parse() -> None:
    assert given(None) == given({}) == ()
    assert given({"d2cache_canvas": [5, -1, None, 7]}) == (5, -1, -1, 7)
    assert parse_request_options({"d2cache_canvas": [5, -1], "d2cache_window": 2}) == {"window": 2}


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("abc", "must be a list of token ids"),
        ([5, -2], "got -2 in slot 1"),
        ([5, "x", -1], "got 'x' in slot 1"),
        ([True, -1], "got True in slot 0"),
        ([1.0, -1], "got 1.0 in slot 0"),
        ([5, 6], "at least one hole"),
        ([], "at least one hole"),
    ],
)
def test_bad_canvas_is_refused(value: Any, said: str) -> None:
    with pytest.raises(OptionError, match=said) as caught:
        given({"d2cache_canvas": value})
    assert str(caught.value).startswith("d2cache_canvas: ")


def given(extra_args: dict[str, Any] | None) -> tuple[int, ...]:
    return Asked.of(SimpleNamespace(extra_args=extra_args, structured_outputs=None)).canvas


def fit(params: SimpleNamespace) -> None:
    check_fit(params, given(params.extra_args), VOCAB, MASK)


def params(**fields: Any) -> SimpleNamespace:
    """Sampling parameters as vLLM hands them on."""
    defaults = {
        "logprobs": None, "logit_bias": None, "allowed_token_ids": None, "bad_words": [], "bad_words_token_ids": None,
        "all_stop_token_ids": {2}, "min_tokens": 0, "eos_token_id": 2, "stop_token_ids": [], "max_tokens": 4,
        "extra_args": None,
    }  # fmt: skip
    return SimpleNamespace(**{**defaults, **fields})


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"extra_args": {"d2cache_canvas": [1, -1]}}, "max_tokens: must be the length of d2cache_canvas, 2"),
        ({"extra_args": {"d2cache_canvas": [1, -1, 13, 1]}}, "d2cache_canvas: .* from 0 to 12"),
        ({"extra_args": {"d2cache_canvas": [1, -1, 5, 1]}}, r"d2cache_canvas: .* the mask token \(5: a hole is -1\)"),
        ({"extra_args": {"d2cache_canvas": [1, 2, -1, -1]}}, "d2cache_canvas: .* before its first stop token"),
        ({"logprobs": -1}, "logprobs: must be 0 to 13, got -1"),
        ({"logprobs": 14}, "logprobs: must be 0 to 13, got 14"),
        ({"logit_bias": dict.fromkeys(range(1025), 1.0)}, "logit_bias: .* at most 1024"),
        ({"allowed_token_ids": [5]}, "allowed_token_ids: leaves no token"),
        ({"allowed_token_ids": [2, 5], "min_tokens": 1}, "allowed_token_ids: leaves no token"),
        ({"bad_words": ["ab"], "bad_words_token_ids": [[1], [3, 4]]}, r"bad_words: .*\[\[3, 4\]\]"),
        ({"bad_words": ["ab"]}, "bad_words: needs a tokenizer"),
        ({"bad_words": ["x"] * 12, "bad_words_token_ids": [[t] for t in range(13)]}, "bad_words: leaves no token"),
    ],
)
def test_what_the_model_cannot_do_is_refused(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(OptionError, match="^" + said):
        fit(params(**fields))


def test_what_fits_passes() -> None:
    fit(params())
    fit(
        params(
            extra_args={"d2cache_canvas": [1, -1, -1, 2]},
            logprobs=13,
            logit_bias={1: 2.0},
            allowed_token_ids=[1, 2],
            bad_words=["a"],
            bad_words_token_ids=[[3]],
            min_tokens=2,
        )
    )
