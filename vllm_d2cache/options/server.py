"""Server-wide and per-request options: parse, check, refuse what is unknown, fill in the published defaults.

Server-wide options come from ``--additional-config '{"d2cache": {...}}'``; per-request ones from
``SamplingParams.extra_args`` (``vllm_xargs`` over HTTP) with the prefix ``d2cache_``. A request's value wins over the
server's, the server's over the defaults. Nothing here imports vLLM or torch.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Any

from vllm_d2cache.options.plugins import POLICY_CLASSES, PolicyError
from vllm_d2cache.options.types import Choice as _Choice
from vllm_d2cache.options.types import Number as _Number
from vllm_d2cache.options.types import Text as _Text

PREFIX = "d2cache_"
SECTION = "d2cache"
# Keys of a request that are no options of decoding and have no server-wide default: infill.py, figures.py,
# snapshots.py.
CANVAS = PREFIX + "canvas"
REPORT = PREFIX + "report"
SNAPSHOTS = PREFIX + "snapshots"
REQUEST_KEYS = (CANVAS, REPORT, SNAPSHOTS)

POLICIES = tuple(POLICY_CLASSES)  # names alone: the classes are loaded when they are needed
SCORES = ("confidence", "margin", "entropy")
CONFIDENCE_MEMORIES = ("first", "latest")
ATTENTION_BACKENDS = ("triton", "xformers", "torch")

# Decoder -> the options that only some decoders read. A request that names one its decoder does not read is refused.
DECODER_OPTIONS: dict[str, tuple[str, ...]] = {
    "confidence": ("threshold", "factor", "score"),
    "eb": ("gamma", "score"),
    "klass": ("kl_threshold", "kl_history_length", "threshold", "factor", "score"),
    "pc": ("clip_alpha",),
    "credit": ("credit_alpha", "credit_beta", "credit_gamma", "threshold", "score"),
    "hierarchical": ("low_threshold", "threshold", "score"),
    "localleap": ("leap_threshold", "leap_radius", "threshold", "score"),
    "wino": ("wide_in_thres", "narrow_out_thres"),
}
DECODERS = tuple(DECODER_OPTIONS)
# Commit as many tokens as their rule allows, with or without a threshold.
_PARALLEL_DECODERS = ("eb", "klass", "credit", "hierarchical", "localleap", "wino")
# Without a threshold (for klass: without a factor either) these would commit one token a step, or everything.
_THRESHOLD_DECODERS = ("klass", "credit", "hierarchical", "localleap")
_DEFAULT_THRESHOLD = 0.9

# Most tokens that a step commits of a request whose tokens are committed from left to right, unless it asks for more.
LONGEST_RUN = 16

# Canvas length of a request that names no max_tokens (the published gen_length of most tasks).
DEFAULT_CANVAS_LENGTH = 256
# Beyond this many rows a step of an 8B model is long enough to hide its launches, and padding costs real time
# (docs/performance.md, "CUDA graphs").
DEFAULT_GRAPH_ROWS = 512


class OptionError(ValueError):
    """An option is unknown or out of range. The message names the field and the valid values."""


REQUEST_FIELDS: dict[str, _Number | _Choice] = {
    "policy": _Choice(POLICIES),
    "window": _Number(int, 0, note="positions; 0 = the whole canvas"),
    "tokens_per_step": _Number(int, 1),
    "threshold": _Number(float, 0, 1, note="0 = off"),
    "factor": _Number(float, 0, note="0 = off"),
    "score": _Choice(SCORES),
    "sigma": _Number(float, 0, note="positions; 0 = no certainty prior"),
    "selection_sigma": _Number(float, 0, note="positions; 0 = rank by confidence alone"),
    "current_k": _Number(int, 1),
    "rollout_p": _Number(float, 0, 1),
    "inflate_w": _Number(int, 0),
    "confidence_memory": _Choice(CONFIDENCE_MEMORIES),
    "confidence_top_p": _Number(float, 0, 1, open_low=True, note="1 = off"),
    "decoder": _Choice(DECODERS),
    "steps": _Number(int, 0, note="0 = tokens_per_step decides"),
    "gamma": _Number(float, 0, note="nats"),
    "kl_threshold": _Number(float, 0, open_low=True, note="nats"),
    "kl_history_length": _Number(int, 1, note="steps"),
    "clip_alpha": _Number(float, 0, open_low=True),
    "credit_alpha": _Number(float, 0),
    "credit_beta": _Number(float, 0, 1),
    "credit_gamma": _Number(float, 0),
    "low_threshold": _Number(float, 0, 1),
    "leap_threshold": _Number(float, 0, 1),
    "leap_radius": _Number(int, 0, note="positions"),
    "wide_in_thres": _Number(float, 0, 1),
    "narrow_out_thres": _Number(float, 0, 1),
}
# Settings of the server, and of no request; null is the same as leaving one out.
_SERVER_FIELDS: dict[str, _Number | _Choice | _Text] = {
    "trace_dir": _Text("a directory name"),
    "refresh_budget": _Number(int, 1, note="rows per request and step"),
    "max_canvas": _Number(int, DEFAULT_CANVAS_LENGTH, note="positions; the default canvas must fit"),
    "token_frequencies": _Text("the name of a .npy file"),
    "attention_backend": _Choice(ATTENTION_BACKENDS),
    "graph_rows": _Number(int, 0, note="rows; 0 = no CUDA graphs"),
    "request_memory": _Number(float, 0, open_low=True, note="GiB"),
}
SERVER_ONLY_FIELDS = tuple(_SERVER_FIELDS)


@dataclass(frozen=True)
class RequestOptions:
    """Everything that decides how one request is decoded and cached.

    Attributes:
        policy: cache policy, one of :data:`POLICIES`.
        window: positions in which tokens may be committed at a time, left to right; 0 = the whole canvas.
        tokens_per_step: tokens committed in a step, at least.
        threshold: commit every candidate whose score reaches it; 0 = off (d2cache.md, section 4).
        factor: commit as many as the factor rule of section 4 allows; 0 = off.
        score: which statistic ranks candidates, one of :data:`SCORES`.
        sigma: width in positions of the certainty prior when committing; 0 = off (section 3.2).
        selection_sigma: the same when choosing which masked positions to refresh (section 3.3).
        current_k: masked positions refreshed a step.
        rollout_p: attention-rollout mass refreshed a step (section 3.5).
        inflate_w: gaps up to this many positions between refreshed positions are refreshed too; 0 = off.
        confidence_memory: ``first`` ranks masked positions by their confidence in the first step, as published;
            ``latest`` by their most recent one, as the paper describes (section 3.7).
        confidence_top_p: nucleus filter on the vocabulary before confidences are taken; 1 = off.
        decoder: which rule commits tokens, one of :data:`DECODERS` (docs/decoders.md).
        steps: steps for the whole canvas, in place of ``tokens_per_step``: each window gets an equal part of them, and
            its tokens are spread over these as the model family's published code does; 0 = off.
        gamma: eb: entropy, in nats, that the tokens of a step may have besides the largest.
        kl_threshold: klass: a distribution that moved by less than this, in nats, has settled.
        kl_history_length: klass: for how many steps in a row it must have settled.
        clip_alpha: pc: the highest score a rare token can have.
        credit_alpha: credit: how much credit raises a logit.
        credit_beta: credit: what remains of a credit after a step.
        credit_gamma: credit: a token of probability p gains p to this power.
        low_threshold: hierarchical: score above which the best slot of a run of masks is committed.
        leap_threshold: localleap: score that suffices near a slot that reaches ``threshold``.
        leap_radius: localleap: how near, in positions.
        wide_in_thres: wino: a candidate is drafted if its score reaches this.
        narrow_out_thres: wino: a drafted token is taken back if its probability, verified, is below this.
        policy_options: what the policy has in options of its own beyond these fields (docs/policies.md), by name.
        ordered: tokens are committed from left to right, as a grammar needs it; no option of a request (grammar.py).
    """

    policy: str = "d2cache"
    window: int = 0
    tokens_per_step: int = 1
    threshold: float = 0.0
    factor: float = 0.0
    score: str = "confidence"
    sigma: float = 10.0
    selection_sigma: float = 10.0
    current_k: int = 32
    rollout_p: float = 0.1
    inflate_w: int = 0
    confidence_memory: str = "first"
    confidence_top_p: float = 1.0
    decoder: str = "confidence"
    steps: int = 0
    gamma: float = 0.001
    kl_threshold: float = 0.01
    kl_history_length: int = 2
    clip_alpha: float = 10.0
    credit_alpha: float = 0.7
    credit_beta: float = 0.8
    credit_gamma: float = 0.2
    low_threshold: float = 0.4
    leap_threshold: float = 0.75
    leap_radius: int = 4
    wide_in_thres: float = 0.7
    narrow_out_thres: float = 0.9
    policy_options: Mapping[str, Any] = field(default_factory=dict)
    ordered: bool = False

    @property
    def commits_many(self) -> bool:
        """Whether a step may commit more than ``tokens_per_step`` tokens."""
        return self.steps > 0 or self.is_parallel

    @property
    def is_parallel(self) -> bool:
        """Whether a rule decides how many tokens a step commits, rather than a count or a number of steps."""
        return self.threshold > 0 or self.factor > 0 or self.decoder in _PARALLEL_DECODERS

    def value(self, name: str) -> Any:
        """An option by name, be it a field or one of the policy's own."""
        return self.policy_options[name] if name in self.policy_options else getattr(self, name)

    def window_length(self, canvas_length: int) -> int:
        """Window length in positions for a canvas of ``canvas_length``."""
        return min(self.window, canvas_length) if self.window else canvas_length

    def longest_run(self, canvas_length: int) -> int:
        """Most tokens that a step commits from left to right; 0 where they are committed in any order."""
        return min(self.window_length(canvas_length), max(self.tokens_per_step, LONGEST_RUN)) if self.ordered else 0

    def most_commits(self, canvas_length: int) -> int:
        """Most tokens that a step commits."""
        if self.ordered:
            return self.longest_run(canvas_length)
        return self.window_length(canvas_length) if self.commits_many else min(self.tokens_per_step, canvas_length)

    def shadow_length(self, canvas_length: int) -> int:
        """Rows that verify tokens in a step, beyond those of the text (samplers/wino.py)."""
        return self.window_length(canvas_length) if self.decoder == "wino" else 0

    def check_canvas(self, canvas_length: int, room: int, given: bool = False) -> None:
        """Refuse what does not go with a canvas of ``canvas_length`` where ``room`` positions are left for it.

        Args:
            given: the request gives the canvas in part (infill.py).

        Raises:
            OptionError: ``steps`` cannot be divided among the windows, there is no room for shadows, or the decoder
                cannot tell given tokens from its own.
        """
        if given and self.decoder == "wino":
            raise OptionError(
                f"{PREFIX}decoder: 'wino' may take back any token of its window and does not go with {CANVAS}, whose "
                "tokens must stay; choose another decoder"
            )
        shadows = self.shadow_length(canvas_length)
        if canvas_length + shadows > room:
            raise OptionError(
                f"{PREFIX}decoder: {self.decoder!r} needs {shadows} positions, its window, besides the canvas of "
                f"{canvas_length}; behind this prompt there is room for {room}"
            )
        windows = -(-canvas_length // self.window_length(canvas_length))
        if self.steps % windows:
            raise OptionError(
                f"{PREFIX}steps: must be a multiple of {windows}, the windows of {self.window_length(canvas_length)} "
                f"positions in a canvas of {canvas_length}, got {self.steps}"
            )


# A request that names the first drops the server's choice of the second.
_ALTERNATIVES = (
    ("threshold", "factor"),
    ("factor", "threshold"),
    ("steps", "tokens_per_step"),
    ("tokens_per_step", "steps"),
)

# What the published scripts use when several tokens are committed in a step (d2cache.md, section 10).
_PARALLEL_DEFAULTS = {"window": 32, "inflate_w": 4, "sigma": 0.0}


@dataclass(frozen=True)
class ServerOptions:
    """Server-wide options. ``request_defaults`` holds only what the operator set.

    Attributes:
        trace_dir: directory for per-request traces; None = off.
        refresh_budget: rows a request may recompute in a step after its first; None = as many as its policy
            asks for. What does not fit waits for the next step, which makes results approximate.
        max_canvas: longest canvas a request may ask for; None = whatever fits behind its prompt.
        token_frequencies: ``.npy`` file of corpus frequencies for the pc decoder; None = there is none.
        attention_backend: what computes on a GPU, one of :data:`ATTENTION_BACKENDS`; None = triton there, torch on CPU.
        graph_rows: on a GPU, refresh steps of up to this many rows are CUDA graphs; 0 = none are.
        request_memory: GiB that maps and stored outputs of all running requests may take (memory_plan.py); None = 2, or
            more where the longest request needs more.
    """

    request_defaults: Mapping[str, Any]
    trace_dir: str | None = None
    refresh_budget: int | None = None
    max_canvas: int | None = None
    token_frequencies: str | None = None
    attention_backend: str | None = None
    graph_rows: int = DEFAULT_GRAPH_ROWS
    request_memory: float | None = None

    def check_canvas_length(self, length: int) -> None:
        """Refuse a canvas that is longer than the operator allows.

        Raises:
            OptionError: names max_tokens and the valid values.
        """
        if self.max_canvas is not None and length > self.max_canvas:
            raise OptionError(
                f"max_tokens: this server allows canvases of 1 to {self.max_canvas} positions, got {length}"
            )

    def resolve(self, request: Mapping[str, Any], ordered: bool = False) -> RequestOptions:
        """Options of one request from its own settings (already parsed) over the server's over the defaults.

        Args:
            ordered: its tokens must be committed from left to right.
        """
        chosen = dict(self.request_defaults)
        for name, other in _ALTERNATIVES:
            if request.get(name, 0) > 0 and other not in request:
                chosen.pop(other, None)
        chosen.update(request)
        chosen = _without_other_decoders(chosen, request)
        chosen = _with_threshold(chosen, request)
        chosen = _with_policy_options(chosen, request)
        if chosen.get("threshold", 0) > 0 and chosen.get("factor", 0) > 0:
            raise OptionError(
                "threshold and factor are alternatives: give one (in a request d2cache_threshold or d2cache_factor)"
            )
        if chosen.get("decoder") == "pc" and self.token_frequencies is None:
            raise OptionError(
                f"{PREFIX}decoder: 'pc' needs a table of corpus frequencies, and this server was started without one "
                f'(additional_config["{SECTION}"]["token_frequencies"])'
            )
        if chosen.get("steps", 0) > 0 and "tokens_per_step" in chosen:
            raise OptionError(
                "steps and tokens_per_step are alternatives: give one (in a request d2cache_steps or "
                "d2cache_tokens_per_step)"
            )
        if chosen.get("decoder") == "wino" and chosen.get("policy", RequestOptions.policy) != "full":
            raise OptionError(
                f"{PREFIX}decoder: 'wino' verifies tokens against a pass over the whole text and goes with "
                f"{PREFIX}policy 'full' alone; name both"
            )
        if RequestOptions(**chosen).is_parallel:
            chosen = {**_PARALLEL_DEFAULTS, **chosen}
        options = RequestOptions(**chosen, ordered=ordered)
        if ordered:
            _check_ordered(options)
        return options


def _check_ordered(options: RequestOptions) -> None:
    """Refuse decoders whose rule does not say how far a step may go from left to right."""
    why = "with structured output, tool_choice 'required' or a named tool, tokens are committed from left to right"
    if options.decoder != "confidence":
        raise OptionError(f"{PREFIX}decoder: {why}; that takes {PREFIX}decoder 'confidence', got {options.decoder!r}")
    if options.factor > 0:
        raise OptionError(
            f"{PREFIX}factor: {why}; that takes {PREFIX}factor 0 ({PREFIX}threshold commits several too), "
            f"got {options.factor}"
        )


def _with_threshold(chosen: dict[str, Any], request: Mapping[str, Any]) -> dict[str, Any]:
    """``chosen`` with a threshold where the decoder needs one.

    Raises:
        OptionError: the request turns it off.
    """
    decoder = chosen.get("decoder", RequestOptions.decoder)
    if decoder not in _THRESHOLD_DECODERS or chosen.get("threshold", 0) > 0 or chosen.get("factor", 0) > 0:
        return chosen
    if "threshold" in request:
        raise OptionError(
            f"{PREFIX}threshold: must be > 0 with {PREFIX}decoder {decoder!r}, got {request['threshold']!r}"
        )
    return {**chosen, "threshold": _DEFAULT_THRESHOLD}


def _without_other_decoders(chosen: dict[str, Any], request: Mapping[str, Any]) -> dict[str, Any]:
    """``chosen`` without options its decoder does not read; the server may have set them for other requests.

    Raises:
        OptionError: the request itself names one.
    """
    decoder = chosen.get("decoder", RequestOptions.decoder)
    read = DECODER_OPTIONS[decoder]
    foreign = {name for names in DECODER_OPTIONS.values() for name in names} - set(read)
    for name in request:
        if name in foreign:
            owners = ", ".join(repr(d) for d, names in DECODER_OPTIONS.items() if name in names)
            raise OptionError(
                f"{PREFIX}{name}: not an option of {PREFIX}decoder {decoder!r}, whose own options are "
                f"{', '.join(PREFIX + n for n in read)}; decoders that read it are {owners}"
            )
    return {name: value for name, value in chosen.items() if name not in foreign}


@functools.cache
def option_types() -> Mapping[str, _Number | _Choice]:
    """The type of every option a request may name: the fields above and what each policy adds.

    Raises:
        PolicyError: a policy cannot be loaded, or claims a name that is taken.
    """
    types: dict[str, _Number | _Choice] = dict(REQUEST_FIELDS)
    for policy, cls in POLICY_CLASSES.items():
        for name, spec in cls.options.items():
            if name in SERVER_ONLY_FIELDS or types.setdefault(name, spec) is not spec:
                raise PolicyError(f"cache policy {policy!r}: its option {name!r} has a name that is taken")
    return MappingProxyType(types)


def _with_policy_options(chosen: Mapping[str, Any], request: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of RequestOptions: the policy's defaults under what was chosen, its own options gathered in one.

    Raises:
        OptionError: the request names an option that only other policies read.
    """
    policy = POLICY_CLASSES[chosen.get("policy", RequestOptions.policy)]
    for name in request:
        readers = [other for other, cls in POLICY_CLASSES.items() if name in cls.options]
        if readers and policy.name not in readers and not policy.takes_all_options:
            own = ", ".join(PREFIX + n for n in policy.options) or "none"
            raise OptionError(
                f"{PREFIX}{name}: an option of {PREFIX}policy {' or '.join(map(repr, readers))}, but this request's "
                f"policy is {policy.name!r}; the options of that policy are: {own}"
            )
    fields_ = {name: value for name, value in chosen.items() if name in REQUEST_FIELDS}
    own_options = {n: chosen.get(n, s.default) for n, s in policy.options.items() if n not in REQUEST_FIELDS}
    return {**policy.defaults, **fields_, "policy_options": own_options}


def _parse_value(spec: _Number | _Choice | _Text, label: str, value: Any) -> Any:
    parsed = spec.parse(value)
    if parsed is None:
        raise OptionError(f"{label}: must be {spec.describe()}, got {value!r}")
    return parsed


def parse_server_options(raw: Mapping[str, Any] | None) -> ServerOptions:
    """Server-wide options from ``additional_config["d2cache"]``.

    Raises:
        OptionError: unknown key or value out of range.
        PolicyError: a cache policy from outside the package cannot be used.
    """
    if raw is not None and not isinstance(raw, Mapping):
        raise OptionError(f'additional_config["{SECTION}"]: must be an object, got {raw!r}')
    defaults: dict[str, Any] = {}
    settings: dict[str, Any] = {}
    for name, value in (raw or {}).items():
        label = f'additional_config["{SECTION}"]["{name}"]'
        if name in option_types():
            defaults[name] = _parse_value(option_types()[name], label, value)
        elif name not in _SERVER_FIELDS:
            valid = ", ".join([*option_types(), *SERVER_ONLY_FIELDS])
            raise OptionError(f"{label}: unknown option; valid options are {valid}")
        elif value is not None:
            settings[name] = _parse_value(_SERVER_FIELDS[name], label, value)
    option_types()  # says now, not at the first request, what is wrong with a policy from outside
    options = ServerOptions(defaults, **settings)
    options.resolve({})
    return options


def parse_request_options(extra_args: Mapping[str, Any] | None) -> dict[str, Any]:
    """The options a request sets itself, by plain name, from its ``extra_args``.

    Raises:
        OptionError: unknown key or value out of range.
    """
    parsed: dict[str, Any] = {}
    for key, value in (extra_args or {}).items():
        if key in REQUEST_KEYS:
            continue
        name = str(key).removeprefix(PREFIX)
        if not str(key).startswith(PREFIX) or name not in option_types():
            hint = f"; {key!r} is set server-wide only" if name in SERVER_ONLY_FIELDS else ""
            valid = ", ".join([*(PREFIX + n for n in option_types()), *REQUEST_KEYS])
            raise OptionError(f"{key}: unknown request option{hint}; valid options are {valid}")
        parsed[name] = _parse_value(option_types()[name], key, value)
    return parsed


assert {*REQUEST_FIELDS, "policy_options", "ordered"} == {f.name for f in fields(RequestOptions)}
