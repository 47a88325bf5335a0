"""Options parsed, checked and put together: a request's over the server's over the published defaults.

Server-wide options come from ``--additional-config '{"d2cache": {...}}'``; per-request ones from
``SamplingParams.extra_args`` (``vllm_xargs`` over HTTP) with the prefix ``d2cache_``.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from vllm_d2cache.decoders.base import Decoder
from vllm_d2cache.decoders.registry import DECODER_CLASSES
from vllm_d2cache.mechanisms.base import conflict
from vllm_d2cache.options.plugins import PluginError
from vllm_d2cache.options.request import PREFIX, REQUEST_KEYS, SCORES, SECTION, RequestOptions
from vllm_d2cache.options.server import SERVER_FIELDS, ServerOptions
from vllm_d2cache.options.types import Choice, Number, OptionError, Text
from vllm_d2cache.policies.registry import POLICY_CLASSES, policy_class

POLICIES, DECODERS = tuple(POLICY_CLASSES), tuple(DECODER_CLASSES)

# What a request may set whatever its policy; of the decoders, all but those named below.
REQUEST_FIELDS: dict[str, Number | Choice] = {
    "policy": Choice(POLICIES),
    "window": Number(int, 0, note="positions; 0 = the whole canvas"),
    "tokens_per_step": Number(int, 1),
    "threshold": Number(float, 0, 1, note="0 = off"),
    "factor": Number(float, 0, note="0 = off"),
    "score": Choice(SCORES),
    "sigma": Number(float, 0, note="positions; 0 = no certainty prior"),
    "confidence_top_p": Number(float, 0, 1, open_low=True, note="1 = off"),
    "decoder": Choice(DECODERS),
    "steps": Number(int, 0, note="0 = tokens_per_step decides"),
}
# Of these, what only decoders read that say so (Decoder.reads).
_DECODER_FIELDS = ("threshold", "factor", "score")

# A request that names the first drops the server's choice of the second.
_ALTERNATIVES = (
    ("threshold", "factor"),
    ("factor", "threshold"),
    ("steps", "tokens_per_step"),
    ("tokens_per_step", "steps"),
)

# What the published scripts use when several tokens are committed in a step (docs/methods/d2cache.md, section 10).
_PARALLEL_DEFAULTS = {"window": 32, "sigma": 0.0}


@functools.cache
def option_types() -> Mapping[str, Number | Choice]:
    """The type of every option a request may name: the fields above, and what each policy and decoder adds.

    Raises:
        PluginError: a policy or decoder cannot be loaded, or claims a name that is taken.
    """
    types: dict[str, Number | Choice] = dict(REQUEST_FIELDS)
    for classes in (POLICY_CLASSES, DECODER_CLASSES):
        for owner, cls in classes.items():
            for name, spec in cls.options.items():
                if name in SERVER_FIELDS or types.setdefault(name, spec) is not spec:
                    raise PluginError(f"{classes.kind} {owner!r}: its option {name!r} has a name that is taken")
    return MappingProxyType(types)


def parse_server_options(raw: Mapping[str, Any] | None) -> ServerOptions:
    """Server-wide options from ``additional_config["d2cache"]``.

    Raises:
        OptionError: unknown key or value out of range.
        PluginError: a policy or decoder from outside the package cannot be used.
    """
    if raw is not None and not isinstance(raw, Mapping):
        raise OptionError(f'additional_config["{SECTION}"]: must be an object, got {raw!r}')
    types = option_types()  # says now, not at the first request, what is wrong with a class from outside
    defaults: dict[str, Any] = {}
    settings: dict[str, Any] = {}
    for name, value in (raw or {}).items():
        label = f'additional_config["{SECTION}"]["{name}"]'
        if name in types:
            defaults[name] = _parse_value(types[name], label, value)
        elif name not in SERVER_FIELDS:
            raise OptionError(f"{label}: unknown option; valid options are {', '.join([*types, *SERVER_FIELDS])}")
        elif value is not None:
            settings[name] = _parse_value(SERVER_FIELDS[name], label, value)
    options = ServerOptions(defaults, **settings)
    resolve(options, {})
    return options


def server_options(config: Any) -> ServerOptions:
    """Those of an engine, from its VllmConfig; errors as above."""
    additional = config.additional_config
    return parse_server_options(additional.get(SECTION) if isinstance(additional, dict) else None)


def parse_request_options(extra_args: Mapping[str, Any] | None) -> dict[str, Any]:
    """The options a request sets itself, by plain name, from its ``extra_args``.

    Raises:
        OptionError: unknown key or value out of range.
    """
    types, parsed = option_types(), {}
    for key, value in (extra_args or {}).items():
        if key in REQUEST_KEYS:
            continue
        name = str(key).removeprefix(PREFIX)
        if not str(key).startswith(PREFIX) or name not in types:
            hint = f"; {key!r} is set server-wide only" if name in SERVER_FIELDS else ""
            valid = ", ".join([*(PREFIX + n for n in types), *REQUEST_KEYS])
            raise OptionError(f"{key}: unknown request option{hint}; valid options are {valid}")
        parsed[name] = _parse_value(types[name], key, value)
    return parsed


def _parse_value(spec: Number | Choice | Text, label: str, value: Any) -> Any:
    parsed = spec.parse(value)
    if parsed is None:
        raise OptionError(f"{label}: must be {spec.describe()}, got {value!r}")
    return parsed


def resolve(server: ServerOptions, request: Mapping[str, Any], ordered: bool = False) -> RequestOptions:
    """Options of one request from its own settings (already parsed) over the server's over the defaults.

    Args:
        ordered: its tokens must be committed from left to right.

    Raises:
        OptionError: they do not go together.
    """
    chosen = dict(server.request_defaults)
    for name, other in _ALTERNATIVES:
        if request.get(name, 0) > 0 and other not in request:
            chosen.pop(other, None)
    chosen.update(request)
    _check_names(chosen, request, server.block_length)
    decoder = DECODER_CLASSES[chosen.get("decoder", RequestOptions.decoder)]
    policy = policy_class(chosen.get("policy", RequestOptions.policy), server.block_length)
    unread = set(_DECODER_FIELDS) - set(decoder.reads)
    shared = {n: v for n, v in chosen.items() if n in REQUEST_FIELDS and n not in unread}
    _check_alternatives(shared)
    shared = {**policy.defaults, **_with_threshold(shared, request), "rule_counts": decoder.commits_many}
    parallel = RequestOptions(**shared).is_parallel
    if parallel:
        shared = {**_PARALLEL_DEFAULTS, **shared}
    options = RequestOptions(
        **shared,
        policy_options=_own(
            policy.options, chosen, {**policy.own_defaults, **(policy.parallel_defaults if parallel else {})}
        ),
        decoder_options=_own(decoder.options, chosen, {}),
        ordered=ordered,
        block=server.block_length,
    )
    _check_blocks(options)
    _check_decoder(options, server)
    return options


def _check_blocks(options: RequestOptions) -> None:
    """Refuse what has no meaning where a row sees its own block of the text and those before it."""
    if not options.block:
        return
    if not policy_class(options.policy, options.block).keeps_blocks:
        fitting = [name for name in POLICY_CLASSES if policy_class(name, options.block).keeps_blocks]
        raise OptionError(
            f"{PREFIX}policy: must be {' or '.join(map(repr, fitting))} with this model, whose rows see their own "
            f"block of positions and those before it, got {options.policy!r}"
        )
    if options.window and options.block % options.window:
        raise OptionError(
            f"{PREFIX}window: must be 0 or divide {options.block}, the block length of this model, got {options.window}"
        )


def _own(
    specs: Mapping[str, Number | Choice], chosen: Mapping[str, Any], defaults: Mapping[str, Any]
) -> dict[str, Any]:
    """A policy's or decoder's own options: chosen, else of ``defaults``, else as declared."""
    return {name: chosen.get(name, defaults.get(name, spec.default)) for name, spec in specs.items()}


def _check_names(chosen: Mapping[str, Any], request: Mapping[str, Any], block: int) -> None:
    """Refuse an option that the request itself names and its policy or decoder does not read.

    The server may have set options for requests of another policy or decoder.
    """
    decoder = DECODER_CLASSES[chosen.get("decoder", RequestOptions.decoder)]
    policy = policy_class(chosen.get("policy", RequestOptions.policy), block)
    for name in request:
        readers = [d for d, cls in DECODER_CLASSES.items() if name in (*cls.options, *cls.reads)]
        if readers and decoder.name not in readers:
            own = ", ".join(PREFIX + n for n in (*decoder.options, *decoder.reads)) or "none"
            raise OptionError(
                f"{PREFIX}{name}: not an option of {PREFIX}decoder {decoder.name!r}, whose own options are {own}; "
                f"decoders that read it are {', '.join(map(repr, readers))}"
            )
        readers = [p for p, cls in POLICY_CLASSES.items() if name in cls.options]
        own = ", ".join(PREFIX + n for n in policy.options) or "none"
        if policy.name in readers and name not in policy.options:
            raise OptionError(
                f"{PREFIX}{name}: has no meaning with this model, whose rows see their own block of "
                f"positions and those before it; the options of {PREFIX}policy {policy.name!r} there are: {own}"
            )
        if readers and policy.name not in readers and not policy.takes_all_options:
            raise OptionError(
                f"{PREFIX}{name}: an option of {PREFIX}policy {' or '.join(map(repr, readers))}, but this request's "
                f"policy is {policy.name!r}; the options of that policy are: {own}"
            )


def _check_alternatives(chosen: Mapping[str, Any]) -> None:
    if chosen.get("threshold", 0) > 0 and chosen.get("factor", 0) > 0:
        raise OptionError(
            "threshold and factor are alternatives: give one (in a request d2cache_threshold or d2cache_factor)"
        )
    if chosen.get("steps", 0) > 0 and "tokens_per_step" in chosen:
        raise OptionError(
            "steps and tokens_per_step are alternatives: give one (in a request d2cache_steps or "
            "d2cache_tokens_per_step)"
        )


def _with_threshold(chosen: dict[str, Any], request: Mapping[str, Any]) -> dict[str, Any]:
    """``chosen`` with a threshold where the decoder cannot do without, and the request has not turned it off."""
    decoder = DECODER_CLASSES[chosen.get("decoder", RequestOptions.decoder)]
    if not decoder.default_threshold or chosen.get("threshold", 0) > 0 or chosen.get("factor", 0) > 0:
        return chosen
    if "threshold" in request:
        raise OptionError(
            f"{PREFIX}threshold: must be > 0 with {PREFIX}decoder {decoder.name!r}, got {request['threshold']!r}"
        )
    return {**chosen, "threshold": decoder.default_threshold}


def _goes_with(decoder: type[Decoder], policy: str, block: int) -> bool:
    """Whether requests may have both."""
    cls = policy_class(policy, block)
    return (cls.keeps_blocks or not block) and not conflict([*cls.uses, *decoder.uses], cls.takes())


def _check_decoder(options: RequestOptions, server: ServerOptions) -> None:
    """Refuse a decoder that lacks something: of the server, of the policy, or a rule from left to right."""
    decoder, policy = DECODER_CLASSES[options.decoder], policy_class(options.policy, options.block)
    for setting in decoder.needs_server:
        if getattr(server, setting) is None:
            raise OptionError(
                f"{PREFIX}decoder: {decoder.name!r} needs {setting}, and this server was started without "
                f'(additional_config["{SECTION}"]["{setting}"])'
            )
    if problem := conflict([*policy.uses, *decoder.uses], policy.takes()):
        fitting = [name for name in POLICY_CLASSES if _goes_with(decoder, name, options.block)]
        others = f"but with {', '.join(map(repr, fitting))} alone; name both" if fitting else "nor with another here"
        raise OptionError(
            f"{PREFIX}decoder: {decoder.name!r} does not go with {PREFIX}policy {policy.name!r} ({problem}), {others}"
        )
    if not options.ordered:
        return
    why = "with structured output, tool_choice 'required' or a named tool, tokens are committed from left to right"
    if decoder.ordered is None:
        fitting = [name for name, cls in DECODER_CLASSES.items() if cls.ordered is not None]
        raise OptionError(
            f"{PREFIX}decoder: {why}; that takes {PREFIX}decoder {' or '.join(map(repr, fitting))}, "
            f"got {options.decoder!r}"
        )
    if options.factor > 0:
        raise OptionError(
            f"{PREFIX}factor: {why}; that takes {PREFIX}factor 0 ({PREFIX}threshold commits several too), "
            f"got {options.factor}"
        )
