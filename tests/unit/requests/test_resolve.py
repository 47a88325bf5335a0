"""Options: published defaults, layering, bounds, and messages that name the field and the valid values."""

from __future__ import annotations

from typing import Any

import pytest

from vllm_d2cache.decoders import DECODER_CLASSES
from vllm_d2cache.options.request import RequestOptions
from vllm_d2cache.options.server import SERVER_FIELDS, ServerOptions
from vllm_d2cache.options.types import OptionError
from vllm_d2cache.policies.d2cache import D2CachePolicy
from vllm_d2cache.requests.fit import check_options_fit
from vllm_d2cache.requests.resolve import (
    REQUEST_FIELDS,
    parse_request_options,
    parse_server_options,
    resolve,
)

DECODER_FIELDS = {name: spec for cls in DECODER_CLASSES.values() for name, spec in cls.options.items()}
INF, NAN = float("inf"), float("nan")

# Field -> valid values, and what each is read as.
ACCEPTED: list[tuple[str, Any, Any]] = [
    ("policy", "d2cache", "d2cache"),
    ("policy", "full", "full"),
    ("window", 0, 0),
    ("window", 32.0, 32),
    ("tokens_per_step", 1, 1),
    ("tokens_per_step", 10**9, 10**9),
    ("threshold", 0, 0.0),
    ("threshold", 1, 1.0),
    ("threshold", 0.9, 0.9),
    ("factor", 0, 0.0),
    ("factor", 1.5, 1.5),
    ("score", "margin", "margin"),
    ("score", "entropy", "entropy"),
    ("sigma", 0, 0.0),
    ("sigma", 50, 50.0),
    ("selection_sigma", 0.5, 0.5),
    ("current_k", 1, 1),
    ("current_k", 10**6, 10**6),
    ("rollout_p", 0, 0.0),
    ("rollout_p", 1, 1.0),
    ("inflate_w", 0, 0),
    ("inflate_w", 4, 4),
    ("confidence_memory", "latest", "latest"),
    ("confidence_top_p", 0.9, 0.9),
    ("confidence_top_p", 1, 1.0),
    ("decoder", "eb", "eb"),
    ("steps", 64, 64),
    ("steps", 0, 0),
    ("gamma", 0, 0.0),
    ("gamma", 2.5, 2.5),
    ("kl_threshold", 0.5, 0.5),
    ("kl_history_length", 3, 3),
    ("clip_alpha", 3, 3.0),
    ("credit_alpha", 0, 0.0),
    ("credit_beta", 1, 1.0),
    ("credit_gamma", 2, 2.0),
    ("low_threshold", 0.5, 0.5),
    ("leap_threshold", 0, 0.0),
    ("leap_radius", 8, 8),
    ("wide_in_thres", 0.5, 0.5),
    ("narrow_out_thres", 1, 1.0),
]

WRONG_FOR_NUMBERS: list[Any] = [True, False, "1", None, [1], {}, NAN, INF, -INF, -1, -0.001, 10**400, -(10**400)]
WRONG_FOR_INTEGERS: list[Any] = [3.5, 1e-9]
WRONG_FOR_CHOICES: list[Any] = ["", "D2cache", "none", 0, 1, True, None, ["d2cache"], {}]
OUT_OF_RANGE: list[tuple[str, Any]] = [
    ("tokens_per_step", 0),
    ("current_k", 0),
    ("threshold", 1.0001),
    ("rollout_p", 1.0001),
    ("confidence_top_p", 0),
    ("confidence_top_p", 0.0),
    ("confidence_top_p", 1.0001),
    ("kl_threshold", 0),
    ("kl_history_length", 0),
    ("clip_alpha", 0),
    ("credit_beta", 1.1),
    ("low_threshold", 1.1),
    ("leap_threshold", 1.1),
    ("wide_in_thres", 1.1),
    ("narrow_out_thres", 1.1),
]
CHOICES = ("policy", "score", "confidence_memory", "decoder")
INTEGERS = ("window", "tokens_per_step", "current_k", "inflate_w", "kl_history_length", "leap_radius", "steps")


def refused() -> list[tuple[str, Any]]:
    cases = list(OUT_OF_RANGE)
    for name in {**REQUEST_FIELDS, **D2CachePolicy.options, **DECODER_FIELDS}:
        wrong = WRONG_FOR_CHOICES if name in CHOICES else WRONG_FOR_NUMBERS
        cases += [(name, value) for value in wrong]
        if name in INTEGERS:
            cases += [(name, value) for value in WRONG_FOR_INTEGERS]
    return cases


def resolved(request: dict[str, Any] | None = None, server: dict[str, Any] | None = None) -> RequestOptions:
    """The whole way: both levels parsed, the request's over the server's over the defaults."""
    prefixed = {f"d2cache_{name}": value for name, value in (request or {}).items()}
    table = {"token_frequencies": "table.npy"}
    return resolve(parse_server_options({**table, **(server or {})}), parse_request_options(prefixed))


def reader_of(name: str) -> dict[str, str]:
    """The decoder to choose so that option ``name`` is read; nothing if the default one reads it."""
    readers = [d for d, cls in DECODER_CLASSES.items() if name in (*cls.options, *cls.reads)]
    return chosen(readers[0]) if readers and readers[0] != "confidence" else {}


def chosen(decoder: str) -> dict[str, str]:
    """Options that choose ``decoder``."""
    return {"decoder": decoder, **({"policy": "full"} if decoder == "wino" else {})}


def test_defaults_are_the_published_ones() -> None:
    """docs/methods/d2cache.md, section 10: the whole canvas at sigma 10 with k = 32, p = 0.1 and no inflation.

    Ocs/methods/d2cache.md, section 10: decodes the whole canvas at sigma 10 with k = 32, p = 0.1 and no
    inflation.
    """
    options = resolved()
    assert options == RequestOptions(
        policy="d2cache",
        window=0,
        tokens_per_step=1,
        threshold=0.0,
        factor=0.0,
        score="confidence",
        sigma=10.0,
        confidence_top_p=1.0,
        policy_options={
            "selection_sigma": 10.0,
            "current_k": 32,
            "rollout_p": 0.1,
            "inflate_w": 0,
            "confidence_memory": "first",
        },
    )
    assert not options.commits_many


@pytest.mark.parametrize("rule", [{"threshold": 0.9}, {"factor": 1.0}])
@pytest.mark.parametrize("level", ["request", "server"])
def test_a_parallel_rule_switches_to_the_published_parallel_defaults(level: str, rule: dict[str, float]) -> None:
    options = resolved(**{level: rule})
    assert (options.window, options.value("inflate_w"), options.sigma) == (32, 4, 0.0)
    assert options.value("selection_sigma") == 10.0
    assert options.commits_many


@pytest.mark.parametrize("level", ["request", "server"])
def test_what_is_set_survives_the_switch(level: str) -> None:
    options = resolved(**{level: {"threshold": 0.9, "window": 8, "inflate_w": 0, "sigma": 3.0}})
    assert (options.window, options.value("inflate_w"), options.sigma) == (8, 0, 3.0)


def test_a_rule_that_is_off_switches_nothing() -> None:
    assert resolved({"threshold": 0, "factor": 0.0}) == resolved()
    assert resolved({"threshold": 0}, {"threshold": 0.9}) == resolved()


def test_request_over_server_over_defaults() -> None:
    options = resolved({"current_k": 8}, {"current_k": 16, "rollout_p": 0.3})
    assert (options.value("current_k"), options.value("rollout_p"), options.sigma) == (8, 0.3, 10.0)


@pytest.mark.parametrize(("mine", "other"), [("threshold", "factor"), ("factor", "threshold")])
def test_a_request_that_picks_one_rule_drops_the_servers_other(mine: str, other: str) -> None:
    options = resolved({mine: 0.5}, {other: 0.9, "window": 16})
    assert (getattr(options, mine), getattr(options, other), options.window) == (0.5, 0.0, 16)
    assert getattr(resolved({mine: 0}, {other: 0.9}), other) == 0.9


@pytest.mark.parametrize("level", ["request", "server"])
def test_both_rules_are_refused(level: str) -> None:
    with pytest.raises(OptionError, match=r"threshold.*factor"):
        resolved(**{level: {"threshold": 0.9, "factor": 1.0}})


def test_both_rules_across_levels_are_refused_only_if_the_request_names_both() -> None:
    with pytest.raises(OptionError):
        resolved({"threshold": 0.9, "factor": 1.0}, {"threshold": 0.5})
    assert resolved({"threshold": 0.9, "factor": 0}, {"factor": 1.0}).factor == 0.0


@pytest.mark.parametrize(("name", "value", "parsed"), ACCEPTED)
def test_valid_values_are_read(name: str, value: Any, parsed: Any) -> None:
    decoder = reader_of(name)
    for options in (resolved({**decoder, name: value}), resolved(server={**decoder, name: value})):
        got = options.value(name)
        assert got == parsed
        assert type(got) is type(parsed)


@pytest.mark.parametrize(("name", "value"), refused(), ids=lambda x: repr(x)[:16])
def test_invalid_values_are_refused_at_both_levels(name: str, value: Any) -> None:
    valid = "one of" if name in CHOICES else ("integer" if name in INTEGERS else "number")
    with pytest.raises(OptionError, match=rf"^d2cache_{name}: must be .*{valid}"):
        parse_request_options({f"d2cache_{name}": value})
    with pytest.raises(OptionError, match=rf'\["{name}"\]: must be .*{valid}'):
        parse_server_options({name: value})


def test_messages_say_what_is_valid() -> None:
    for name, value, words in [
        ("policy", "fast", ["'d2cache'", "'full'", "'fast'"]),
        ("score", 1, ["'confidence'", "'margin'", "'entropy'"]),
        ("threshold", 2, [">= 0", "<= 1", "0 = off", "2"]),
        ("confidence_top_p", 0, ["> 0", "<= 1"]),
        ("current_k", 0, ["an integer >= 1"]),
    ]:
        with pytest.raises(OptionError) as error:
            parse_request_options({f"d2cache_{name}": value})
        for word in words:
            assert word in str(error.value)


@pytest.mark.parametrize("key", ["d2cache_sigmaa", "d2cache_", "sigma", "kv_transfer_params", "d2cache_d2cache_sigma"])
def test_unknown_request_keys_are_refused_with_the_valid_ones(key: str) -> None:
    with pytest.raises(OptionError) as error:
        parse_request_options({"d2cache_window": 8, key: 1})
    assert str(error.value).startswith(key)
    for name in REQUEST_FIELDS:
        assert f"d2cache_{name}" in str(error.value)


@pytest.mark.parametrize("key", ["sigmaa", "d2cache_sigma", ""])
def test_unknown_server_keys_are_refused_with_the_valid_ones(key: str) -> None:
    with pytest.raises(OptionError) as error:
        parse_server_options({key: 1})
    for name in (*REQUEST_FIELDS, "trace_dir", "refresh_budget", "attention_backend"):
        assert name in str(error.value)


def test_pc_needs_a_table() -> None:
    for server, request in [({}, {"d2cache_decoder": "pc"}), ({"decoder": "pc"}, {})]:
        with pytest.raises(OptionError, match="'pc' needs token_frequencies"):
            resolve(parse_server_options(server), parse_request_options(request))


@pytest.mark.parametrize(
    "name", ["trace_dir", "refresh_budget", "token_frequencies", "attention_backend", "graph_rows"]
)
def test_server_only_keys_in_a_request_say_so(name: str) -> None:
    with pytest.raises(OptionError, match="server-wide only"):
        parse_request_options({f"d2cache_{name}": 1})


def test_server_only_fields() -> None:
    options = parse_server_options({"trace_dir": "traces", "refresh_budget": 64})
    assert (options.trace_dir, options.refresh_budget) == ("traces", 64)
    assert parse_server_options({"token_frequencies": "t.npy"}).token_frequencies == "t.npy"
    empty = parse_server_options(dict.fromkeys(SERVER_FIELDS))
    assert empty == parse_server_options(None) == parse_server_options({}) == ServerOptions({})


@pytest.mark.parametrize("value", [-1, True, "512", 1.5])
def test_bad_graph_rows(value: Any) -> None:
    assert [parse_server_options({"graph_rows": n}).graph_rows for n in (0, 96)] == [0, 96]
    with pytest.raises(OptionError, match=r"graph_rows.*0 = no CUDA graphs"):
        parse_server_options({"graph_rows": value})


@pytest.mark.parametrize("value", ["", 3, True, ["a"]])
def test_bad_trace_dir(value: Any) -> None:
    with pytest.raises(OptionError, match=r"trace_dir.*directory"):
        parse_server_options({"trace_dir": value})


@pytest.mark.parametrize("value", ["", 3, True, ["a"]])
def test_bad_token_frequencies(value: Any) -> None:
    with pytest.raises(OptionError, match=r"token_frequencies.*\.npy"):
        parse_server_options({"token_frequencies": value})


@pytest.mark.parametrize("value", [0, -1, 2.5, "64", True, NAN, 10**400])
def test_bad_refresh_budget(value: Any) -> None:
    with pytest.raises(OptionError, match=r"refresh_budget.*integer >= 1"):
        parse_server_options({"refresh_budget": value})


@pytest.mark.parametrize("value", [[], "sigma=3", 5])
def test_server_options_must_be_an_object(value: Any) -> None:
    with pytest.raises(OptionError, match="must be an object"):
        parse_server_options(value)


def test_no_extra_args_is_no_options() -> None:
    assert parse_request_options(None) == parse_request_options({}) == {}


def test_window_length() -> None:
    assert RequestOptions(window=0).window_length(24) == 24
    assert RequestOptions(window=8).window_length(24) == 8
    assert RequestOptions(window=99).window_length(24) == 24


READ = {decoder: (*cls.options, *cls.reads) for decoder, cls in DECODER_CLASSES.items()}
FOREIGN = [
    (decoder, name)
    for decoder, own in READ.items()
    for name in dict.fromkeys(n for names in READ.values() for n in names)
    if name not in own
]
EXAMPLE: dict[str, Any] = {"score": "margin", "factor": 1.0}


@pytest.mark.parametrize(("decoder", "name"), FOREIGN)
def test_an_option_of_another_decoder_is_refused_where_the_request_names_it(decoder: str, name: str) -> None:
    value = EXAMPLE.get(name, 1)
    with pytest.raises(OptionError) as error:
        resolved({**chosen(decoder), name: value})
    assert str(error.value).startswith(f"d2cache_{name}: not an option of d2cache_decoder '{decoder}'")
    for valid in READ[decoder]:
        assert f"d2cache_{valid}" in str(error.value)
    with pytest.raises(OptionError, match=f"d2cache_{name}: not an option"):
        resolved({name: value}, chosen(decoder))


def test_server_defaults_of_one_decoder_do_not_reach_another() -> None:
    server = {"decoder": "eb", "gamma": 0.5, "threshold": 0.9}
    assert (resolved({}, server).value("gamma"), resolved({}, server).threshold) == (0.5, 0.0)
    options = resolved({"decoder": "confidence"}, server)
    assert (options.threshold, options.decoder_options) == (0.9, {})


@pytest.mark.parametrize("decoder", ["eb", "klass", "credit", "hierarchical", "localleap"])
def test_parallel_decoders_bring_the_parallel_defaults(decoder: str) -> None:
    options = resolved({"decoder": decoder})
    assert (options.window, options.value("inflate_w"), options.sigma) == (32, 4, 0.0)
    assert options.commits_many
    assert resolved({"decoder": decoder, "window": 0, "sigma": 2}).sigma == 2.0


@pytest.mark.parametrize("decoder", ["klass", "credit", "hierarchical", "localleap"])
def test_a_decoder_that_needs_a_threshold_has_one(decoder: str) -> None:
    assert resolved({"decoder": decoder}).threshold == resolved({}, {"decoder": decoder}).threshold == 0.9
    assert resolved({"decoder": decoder}, {"threshold": 0.7}).threshold == 0.7
    with pytest.raises(OptionError, match=f"d2cache_threshold: must be > 0 with d2cache_decoder '{decoder}'"):
        resolved({"decoder": decoder, "threshold": 0})


def test_klass_takes_a_factor_in_place_of_a_threshold() -> None:
    options = resolved({"decoder": "klass", "factor": 1.0})
    assert (options.threshold, options.factor) == (0.0, 1.0)


@pytest.mark.parametrize("level", ["request", "server"])
def test_steps_and_tokens_per_step_are_refused_together(level: str) -> None:
    with pytest.raises(OptionError, match=r"steps.*tokens_per_step"):
        resolved(**{level: {"steps": 8, "tokens_per_step": 1}})
    assert resolved(**{level: {"steps": 0, "tokens_per_step": 2}}).tokens_per_step == 2


def test_a_request_that_gives_steps_drops_the_servers_tokens_per_step() -> None:
    options = resolved({"steps": 8}, {"tokens_per_step": 4})
    assert (options.steps, options.tokens_per_step) == (8, 1)
    options = resolved({"tokens_per_step": 4}, {"steps": 8})
    assert (options.steps, options.tokens_per_step) == (0, 4)
    assert resolved({"steps": 8}).commits_many
    assert resolved({"steps": 8}).sigma == 10.0, "a number of steps is no parallel rule"


def test_steps_must_divide_among_the_windows() -> None:
    options = resolved({"steps": 12, "window": 8})
    check_options_fit(options, 32, 99, False)
    check_options_fit(options, 17, 99, False)  # windows of 8, 8 and 1
    with pytest.raises(OptionError, match="d2cache_steps: must be a multiple of 5"):
        check_options_fit(options, 40, 99, False)
    check_options_fit(resolved({"steps": 7}), 40, 99, False)
    check_options_fit(resolved(), 40, 99, False)
