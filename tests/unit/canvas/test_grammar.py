"""Requests with a grammar: what each step commits, whatever policy, options and mates."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.automata import STOP, Automaton, automata, chain
from tests.unit.batches import MASK, Batch, FakeJob, run_alone
from tests.unit.edits import NEVER, edited
from tests.unit.strategies import DECODING, POLICIES, jobs
from vllm_d2cache.canvas.grammar import bits_of
from vllm_d2cache.options.request import LONGEST_RUN
from vllm_d2cache.options.sampling import EditSpec, SamplingSpec
from vllm_d2cache.options.server import ServerOptions
from vllm_d2cache.options.types import OptionError
from vllm_d2cache.requests.grammar_schema import check_schema, without_spare_whitespace
from vllm_d2cache.requests.resolve import resolve

RULES: list[dict[str, Any]] = [
    {},
    {"tokens_per_step": 3},
    {"tokens_per_step": 100},
    {"steps": 3, "window": 0},
    {"threshold": 0.3},
    {"threshold": 0.05, "tokens_per_step": 2},
    {"threshold": 0.2, "window": 4, "sigma": 3},
]


@st.composite
def constrained(draw: st.DrawFn, policy: str | None = None, greedy: bool = False) -> FakeJob:
    """A request with a grammar; stop tokens besides the grammar's own end mean nothing to it."""
    policy = policy or draw(st.sampled_from(list(POLICIES)))
    own = draw(st.fixed_dictionaries({}, optional={**DECODING, **POLICIES[policy]}))
    job = draw(jobs("full"))
    sampling = SamplingSpec() if greedy else job.sampling
    return replace(
        job,
        options={**own, **draw(st.sampled_from(RULES)), "policy": policy},
        sampling=replace(sampling, stop_token_ids=(STOP,)),
        grammar=draw(automata()).matcher,
    )


def grammar_of(job: FakeJob) -> Automaton:
    assert job.grammar is not None
    return job.grammar.__self__  # type: ignore[attr-defined, no-any-return]


def best(row: torch.Tensor, allowed: set[int] | None = None) -> tuple[int, float]:
    """The best token but the mask, of those allowed, and its share of the softmax."""
    logits = row.tolist()
    choosable = [t for t in range(len(logits)) if t != MASK and (allowed is None or t in allowed)]
    token = max(choosable, key=lambda t: (logits[t], -t))
    return token, float(row.softmax(-1)[token])


def check_step(job: FakeJob, number: int, before: list[int]) -> list[int]:
    """The step's commits, replayed in plain words; returns its tokens."""
    grammar, step = grammar_of(job), job.steps[number]
    logits = job.numbers(number)[0][len(job.prompt) :]
    written = [token for _, token in step.committed]
    assert [slot for slot, _ in step.committed] == list(range(len(before), len(before) + len(written)))
    state = grammar.reads(before)
    assert state is not None
    token, _ = best(logits[len(before)], grammar.allowed(state))
    assert written[0] == token
    agrees = True
    for i, token in enumerate(written):
        slot = len(before) + i
        allowed = grammar.allowed(grammar.reads(before + written[:i]))
        own, probability = best(logits[slot])
        if i:
            threshold = job.options.get("threshold", 0)
            sure = 0 < threshold <= probability + 1e-6
            assert allowed == {token} or (agrees and token == own and (sure or i < least(job, number, len(before))))
        agrees &= token == own
    if job.options["policy"] == "full":
        assert not goes_on(job, number, before, written, agrees)
    return written


def goes_on(job: FakeJob, number: int, before: list[int], written: list[int], agrees: bool) -> bool:
    """Whether the step should have committed the next slot too, all of which are computed."""
    text = before + written
    window = job.options.get("window", 0) or job.canvas_length
    end = min(job.canvas_length, len(before) - len(before) % window + window)
    longest = max(LONGEST_RUN, job.options.get("tokens_per_step", 1))
    if STOP in text or len(text) == end or len(written) == longest:
        return False
    allowed = grammar_of(job).allowed(grammar_of(job).reads(text))
    own, probability = best(job.numbers(number)[0][len(job.prompt) + len(text)])
    threshold = job.options.get("threshold", 0)
    sure = 0 < threshold <= probability - 1e-6
    wanted = sure or len(written) < least(job, number, len(before))
    return len(allowed) == 1 or (agrees and own in allowed and wanted)


def least(job: FakeJob, number: int, written: int) -> int:
    if "steps" in job.options:
        return -(-(job.canvas_length - written) // max(1, job.options["steps"] - number))
    return job.options.get("tokens_per_step", 1)


@given(
    constrained(greedy=True).map(lambda job: replace(job, options={**job.options, "score": "confidence", "sigma": 0}))
)
def test_each_step_commits_what_the_grammar_and_the_decoder_allow(job: FakeJob) -> None:
    job = replace(job, options={k: v for k, v in job.options.items() if k != "confidence_top_p"})
    done = run_alone(job)
    text: list[int] = []
    for number in range(len(done.steps)):
        text += check_step(done, number, text)
    assert text == done.output
    assert grammar_of(done).reads(text) == -1 or len(text) == done.canvas_length


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("policy", POLICIES)
@settings(max_examples=20)
@given(data=st.data())
def test_every_step_commits_under_every_policy(policy: str, shift: int, data: st.DataObject) -> None:
    """Left to right, within the grammar, within the rows reserved, and of rows that were computed."""
    job = data.draw(constrained(policy))
    batch = Batch([job], shift=shift)
    batch.add(0)
    bound = batch.runner.canvas.requests[batch.slot(0)].row_budget
    while not job.done:
        batch.step([0])
        step = job.steps[-1]
        slots = [slot for slot, _ in step.committed]
        assert slots and step.emitted == [token for _, token in step.committed]
        assert slots == list(range(len(job.output) - len(slots), len(job.output)))
        assert len(slots) <= max(LONGEST_RUN, job.options.get("tokens_per_step", 1))
        assert set(slots) <= set(step.predicted)
        assert step.keys is None or set(step.refreshed) <= set(step.keys)
    assert max((len(step.refreshed) for step in job.steps[1:]), default=0) <= bound <= job.total
    state = grammar_of(job).reads(job.output)
    assert state is not None
    assert state == -1 or len(job.output) == job.canvas_length


@settings(max_examples=60)
@given(st.lists(st.tuples(st.one_of(constrained(), jobs(stops=True)), st.integers(0, 5)), min_size=2, max_size=4))
def test_mates_change_nothing(members: list[tuple[FakeJob, int]]) -> None:
    together = [job for job, _ in members]
    Batch(together).run([start for _, start in members])
    for job in together:
        alone = run_alone(job)
        assert alone.steps == job.steps
        assert alone.output == job.output


@given(constrained(), st.data())
def test_a_preempted_request_writes_the_same_text(job: FakeJob, data: st.DataObject) -> None:
    want = run_alone(job)
    emitted = data.draw(st.integers(0, max(0, len(want.output) - 1)))
    again = job.fresh()
    again.emitted_before = emitted
    Batch([again]).run()
    assert again.output == want.output[emitted:]


def run_chain(text: list[int], canvas_length: int) -> FakeJob:
    sampling = SamplingSpec(stop_token_ids=(STOP,))
    return run_alone(FakeJob([0], canvas_length, {"policy": "full"}, sampling, grammar=chain(*text).matcher))


def test_what_is_forced_takes_one_step() -> None:
    text = [1, 2, 3, 4, 6, 8, 9]
    done = run_chain(text, 20)
    assert done.output == [*text, STOP]
    assert len(done.steps) == 1


def test_a_step_goes_no_further_than_its_longest_run() -> None:
    text = [1, 2] * 20
    done = run_chain(text, 60)
    assert done.output == [*text, STOP]
    assert [len(step.committed) for step in done.steps] == [LONGEST_RUN, LONGEST_RUN, 41 - 2 * LONGEST_RUN]


def test_the_canvas_may_end_before_the_text() -> None:
    assert run_chain([1, 2, 3, 4], 3).output == [1, 2, 3]


def test_a_dead_end_is_ended_against_the_grammar() -> None:
    """vLLM's scheduler, which follows the grammar too, refuses that token."""
    dead = Automaton(({1: 1}, {}), frozenset())
    done = run_alone(FakeJob([0], 9, {}, SamplingSpec(stop_token_ids=(STOP,)), grammar=dead.matcher))
    assert done.output == [1, STOP]
    assert dead.reads(done.output) is None


@given(constrained(greedy=True), st.sampled_from([(1.3, 0.0, 0.0), (1.0, 2.0, 0.5)]), st.integers(-8, 8))
def test_penalties_and_biases_weigh_what_the_grammar_leaves(
    job: FakeJob, penalties: tuple[float, float, float], bias: int
) -> None:
    spec = EditSpec(bias=((3, float(bias)),), penalties=penalties)
    job = replace(job, options={"policy": "full"}, sampling=replace(job.sampling, edits=spec))
    done = run_alone(job)
    text: list[int] = []
    for number, step in enumerate(done.steps):
        logits = done.numbers(number)[0][len(job.prompt) + len(text)].tolist()
        row = edited(logits, spec, len(text), job.prompt, text)
        allowed = grammar_of(job).allowed(grammar_of(job).reads(text)) - {MASK}
        chosen = step.committed[0][1]
        assert chosen in allowed
        assert row[chosen] > NEVER
        assert row[chosen] >= max(row[t] for t in allowed) - 1e-5 * max(1.0, abs(row[chosen]))
        text += step.emitted


IGNORED: list[dict[str, Any]] = [
    {"type": "integer", "not": {"const": 3}},
    {"properties": {"a": {"items": {"uniqueItems": True}}}},
    {"$defs": {"x": {"anyOf": [{"type": "null"}, {"multipleOf": 3}]}}},
    {"items": {"if": {"required": ["a"]}}},
]


@pytest.mark.parametrize("schema", IGNORED, ids=str)
def test_a_keyword_that_would_be_ignored_is_refused(schema: dict[str, Any]) -> None:
    for given_as in (schema, json.dumps(schema)):
        with pytest.raises(OptionError, match=r"^structured_outputs: .* has '(not|uniqueItems|multipleOf|if)', which"):
            check_schema(given_as, "xgrammar")
        check_schema(given_as, "guidance")


def test_names_are_no_keywords() -> None:
    names = {name: {"type": "string", "enum": ["not", "if"]} for name in ("not", "if", "contains")}
    check_schema({"type": "object", "properties": names, "$defs": names, "const": {"not": 1}}, "xgrammar")
    check_schema(True, "xgrammar")


@pytest.mark.parametrize("pattern", ["^\t$", r"^a\tb$", r"\x01", r"\u000A", r"\\\n", r"\cJ"])
def test_patterns_that_json_cannot_hold(pattern: str) -> None:
    for schema in ({"pattern": pattern}, {"patternProperties": {pattern: {}}}):
        inside = {"type": "object", "properties": {"a": {"anyOf": [{"type": "string", **schema}]}}}
        with pytest.raises(OptionError, match=r"structured_outputs: .* has the pattern .* control character"):
            check_schema(inside, "xgrammar")
        check_schema(inside, "guidance")


def test_patterns_that_json_can_hold() -> None:
    for pattern in (r"\\t", r"\s+x", "tn0", r"\d{3}", r"\x41", r"\u00e9", r"[^\w]"):
        check_schema({"type": "string", "pattern": pattern}, "xgrammar")


def test_json_in_structural_tags_has_no_spare_whitespace() -> None:
    free = {"type": "json_schema", "json_schema": {"items": {"type": "json_schema"}}}
    bounded = {"type": "json_schema", "max_whitespace_cnt": 3}
    unsaid = {**free, "max_whitespace_cnt": None}  # as vLLM's tool parsers write it
    tag = {"type": "structural_tag", "format": {"type": "sequence", "elements": [{"content": free}, unsaid, bounded]}}
    limited = json.loads(without_spare_whitespace(json.dumps(tag)))
    once = {**free, "max_whitespace_cnt": 1}
    assert limited["format"]["elements"] == [{"content": once}, once, bounded]
    older = json.dumps({"structures": [{"begin": "<a>", "schema": free, "end": "</a>"}], "triggers": ["<a>"]})
    assert without_spare_whitespace(older) == older


@given(st.sets(st.integers(0, 99)), st.integers(4, 6))
def test_bits_are_those_of_the_tokens(tokens: set[int], width: int) -> None:
    words = torch.from_numpy(bits_of(tokens, width))
    bits = (words.unsqueeze(1) >> torch.arange(32, dtype=torch.int32)) & 1
    assert bits.flatten().nonzero().flatten().tolist() == sorted(tokens)


@pytest.mark.parametrize("options", [{"decoder": "wino", "policy": "full"}, {"decoder": "eb"}, {"decoder": "credit"}])
def test_other_decoders_are_refused_by_name(options: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=r"d2cache_decoder: .*from left to right.*'confidence'"):
        resolve(ServerOptions({}), options, ordered=True)
    with pytest.raises(OptionError, match=r"d2cache_decoder"):
        resolve(ServerOptions(options), {}, ordered=True)
    assert resolve(ServerOptions(options), {"decoder": "confidence"}, ordered=True).ordered


def test_the_factor_rule_is_refused_by_name() -> None:
    with pytest.raises(OptionError, match=r"d2cache_factor: .* got 1.5"):
        resolve(ServerOptions({}), {"factor": 1.5}, ordered=True)
    assert resolve(ServerOptions({"factor": 1.5}), {"factor": 0}, ordered=True).factor == 0
