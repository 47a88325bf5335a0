"""Patches of vLLM's front end, for our architectures only: the default canvas, and where requests are checked.

What is refused, and in which order, others say (engine/refusals.py): the checks are handed in. The patches start from
the dictionary of default sampling parameters that vLLM asks the model configuration for: for our models it is a
:class:`CanvasDefaults`, and what is wrapped further down looks for that type. A server of another model in the same
environment never sees one.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator, Set
from dataclasses import dataclass
from typing import Any

from vllm_d2cache.compat import early_checks, prompt_ends, routes, snapshot_stream
from vllm_d2cache.compat.internals import as_validation_error, loaded, stop_at_pad
from vllm_d2cache.options.request import CANVAS
from vllm_d2cache.options.server import DEFAULT_CANVAS_LENGTH
from vllm_d2cache.requests.dropped_fields import WITHOUT_EFFECT
from vllm_d2cache.requests.generation_defaults import UNSUPPORTED_DEFAULTS

_MARK = "_vllm_d2cache"
_LONGEST = "_vllm_d2cache_longest"  # of a ModelConfig: the operator's max_canvas
# Request classes of the OpenAI server, and the fields in which a client may give the canvas length.
_PROTOCOLS = {
    "vllm.entrypoints.openai.completion.protocol.CompletionRequest": ("max_tokens",),
    "vllm.entrypoints.openai.chat_completion.protocol.ChatCompletionRequest": (
        "max_completion_tokens",
        "max_tokens",
    ),
    "vllm.entrypoints.openai.responses.protocol.ResponsesRequest": ("max_output_tokens",),
}


# Classes that stream, and the generators that do it.
_STREAMS = {
    "vllm.entrypoints.openai.completion.serving.OpenAIServingCompletion": "completion_stream_generator",
    "vllm.entrypoints.openai.chat_completion.serving.OpenAIServingChat": "chat_completion_stream_generator",
}


class CanvasDefaults(dict[str, Any]):
    """Default sampling parameters of a model whose max_tokens is a canvas, or says when a text that grows is to stop.

    The server asks ``get`` for max_tokens in order to cut a canvas, and is told nothing but what the operator has said:
    a canvas is refused, not cut. ``[]`` has the length of a request that names none; None = all that is left.

    Attributes:
        cap: the longest canvas that the operator lets a request have (max_new_tokens); None = as long as fits.
        grows: whether texts grow block by block: then a default is what is left of the context, or cut to that.
        longest: the same as ``cap``, by another name of the operator's (max_canvas); a default keeps to it.
    """

    def __init__(
        self, params: dict[str, Any], cap: int | None = None, grows: bool = False, longest: int | None = None
    ) -> None:
        length = longest if grows else DEFAULT_CANVAS_LENGTH
        super().__init__({"max_tokens": length, "temperature": 0.0, **params})
        self.cap, self.grows, self.longest = cap, grows, longest

    def get(self, key: str, default: Any = None) -> Any:
        """As of any dictionary, but for max_tokens: the operator's cap."""
        return self.cap if key == "max_tokens" else super().get(key, default)

    def length(self, room: int) -> int:
        """Of a request that names none, where ``room`` positions are left; refused later on if it does not fit."""
        if not self.grows:
            return int(self["max_tokens"])
        return max(1, min(n for n in (room, self["max_tokens"], self.longest) if n is not None))


@dataclass(frozen=True)
class FieldChecks:
    """What is asked of a request before there are sampling parameters; each raises OptionError.

    Attributes:
        fields: of the fields that the request sets, the defaults of those without effect, and fields that are none.
        nested: of the name of an object in it, what it has, and the keys that vLLM knows.
        room: of the name of a field, the canvas length that it asks for, the positions left for it, whether the length
            is the default, the operator's cap or None, and whether the prompt comes back with the answer.
        echo: of the log-probabilities that a request asks for whose prompt comes back with the answer.
    """

    fields: Callable[[dict[str, Any], dict[str, Any], dict[str, Any]], None]
    nested: Callable[[str, dict[str, Any], Set[str]], None]
    room: Callable[[str, int, int, bool, int | None, bool], None]
    echo: Callable[[Any], None]


def install(architectures: frozenset[str], checks: FieldChecks) -> None:
    """Wrap ``ModelConfig.get_diff_sampling_param``; idempotent. Called in every process."""
    # Without it: a chat request without max_tokens gets all of max_model_len as its canvas, sampled at temperature 1.
    # No hook: override_generation_config["max_new_tokens"] is a cap, not a default. Remove when: a config hook may
    # set a default for max_tokens.
    from vllm.config import ModelConfig

    original = ModelConfig.get_diff_sampling_param
    if hasattr(original, _MARK):
        return

    @functools.wraps(original)
    def get_diff_sampling_param(self: ModelConfig) -> dict[str, Any]:
        params = original(self)
        if architectures.isdisjoint(self.architectures):
            return params
        # The OpenAI server asks for these once, in its own process, after its request classes are there.
        patch_protocols(architectures, checks)
        # A default that every request would be refused for; the config hook names it in the log. An operator's own
        # override was refused at the start.
        for name in UNSUPPORTED_DEFAULTS:
            params.pop(name, None)
        grows = bool(self.hf_config.traits().block_length)
        return CanvasDefaults(params, _cap(self, params), grows, getattr(self, _LONGEST, None))

    setattr(get_diff_sampling_param, _MARK, True)
    ModelConfig.get_diff_sampling_param = get_diff_sampling_param


def note_longest(model_config: Any, length: int | None) -> None:
    """The operator's max_canvas: the default length of a text that grows keeps to it. By the config hook."""
    setattr(model_config, _LONGEST, length)


def _cap(config: Any, params: dict[str, Any]) -> int | None:
    """The canvas length that vLLM takes for a cap: in the operator's words or in a file that the operator names."""
    if config.generation_config in ("auto", "vllm"):
        return config.override_generation_config.get("max_new_tokens")
    return params.get("max_tokens")


def patch_protocols(architectures: frozenset[str], checks: FieldChecks) -> None:
    """Wrap the request classes that are loaded (none is, offline), the routes and the streams."""
    early_checks.install(architectures)
    routes.install(CanvasDefaults)
    for path, generator in _STREAMS.items():
        if (serving := loaded(path)) is not None:
            snapshot_stream.install(serving, generator, CanvasDefaults)
    for path, names in _PROTOCOLS.items():
        cls = loaded(path)
        if cls is not None and not hasattr(cls.to_sampling_params, _MARK):
            _patch_online_length(cls, names, checks)
            if hasattr(cls, "to_beam_search_params"):
                _patch_beam_search(cls, checks)
            if cls.__name__ == "CompletionRequest":
                # Without it: a completion without max_tokens gets 16, before anybody asks for defaults. No hook: a
                # field's default. Remove when: the server asks the model's defaults here as it does for chat.
                cls.model_fields["max_tokens"].default = None


def _patch_online_length(cls: Any, names: tuple[str, ...], checks: FieldChecks) -> None:
    # Without it: a canvas that does not fit behind the prompt is silently cut to what fits, which changes the result
    # of a diffusion model. No hook: get_max_tokens takes the minimum before parameters exist. Remove when: vLLM can be
    # told to refuse instead.
    original = cls.to_sampling_params

    @functools.wraps(original)
    def to_sampling_params(self: Any, max_tokens: int, default_sampling_params: dict[str, Any] | None = None) -> Any:
        if not isinstance(default_sampling_params, CanvasDefaults):
            return original(self, max_tokens, default_sampling_params)
        _check_fields(self, checks)
        length = _canvas_length(self, names, max_tokens, default_sampling_params, checks)
        if len(names) == 1:  # later on these read the request for it
            setattr(self, names[0], length)
        params = original(self, length, default_sampling_params)
        return _without_echoed_logprobs(self, params, checks)

    setattr(to_sampling_params, _MARK, True)
    cls.to_sampling_params = to_sampling_params


def _canvas_length(
    request: Any, names: tuple[str, ...], room: int, defaults: CanvasDefaults, checks: FieldChecks
) -> int:
    """How long the canvas of ``request`` is; refuses one that does not fit in ``room``, to which vLLM would cut it."""
    # vars: reading a deprecated field as an attribute warns.
    asked = next(((n, vars(request)[n]) for n in names if vars(request).get(n) is not None), None)
    given = (getattr(request, "vllm_xargs", None) or {}).get(CANVAS)
    if asked is None and isinstance(given, list):
        return max(1, len(given))  # whether it fits is asked where it is checked
    field, length = asked or (names[-1], defaults.length(room))
    # A chat's echo is of its last message, not of the prompt.
    echoes = bool(getattr(request, "echo", False)) and names == ("max_tokens",)
    as_validation_error(checks.room, field, length, room, asked is None, defaults.cap, echoes)
    return int(length)


def _without_echoed_logprobs(request: Any, params: Any, checks: FieldChecks) -> Any:
    """vLLM takes ``echo`` for a wish to see the prompt's log-probabilities, in a chat even without ``logprobs``."""
    if not getattr(request, "echo", False) or params.prompt_logprobs is None or request.prompt_logprobs is not None:
        return params
    as_validation_error(checks.echo, request.logprobs)
    params.prompt_logprobs = None
    return params


def _patch_beam_search(cls: Any, checks: FieldChecks) -> None:
    # Without it: beam search asks for one token at a time, each on a canvas of its own, and ranks them by likelihoods
    # that were never made for it. No hook: its parameters are not checked. Remove when: they are.
    original = cls.to_beam_search_params

    @functools.wraps(original)
    def to_beam_search_params(self: Any, max_tokens: int, default_sampling_params: dict[str, Any] | None = None) -> Any:
        if isinstance(default_sampling_params, CanvasDefaults):
            _check_fields(self, checks)
        return original(self, max_tokens, default_sampling_params)

    setattr(to_beam_search_params, _MARK, True)
    cls.to_beam_search_params = to_beam_search_params


def install_beam_search_check(architectures: frozenset[str], checks: FieldChecks) -> None:
    """Wrap ``LLM.beam_search`` where it is loaded, once, for these and those of earlier calls. By the config hook."""
    # Why, and remove when: as for the requests.
    cls = getattr(sys.modules.get("vllm.entrypoints.generate.beam_search.offline"), "BeamSearchOfflineMixin", None)
    if cls is None or _widened(cls.beam_search, architectures):
        return
    original, ours = cls.beam_search, set(architectures)

    @functools.wraps(original)
    def beam_search(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not ours.isdisjoint(self.model_config.architectures):
            as_validation_error(checks.fields, {"use_beam_search": True}, {"use_beam_search": False}, {})
        return original(self, *args, **kwargs)

    setattr(beam_search, _MARK, ours)
    cls.beam_search = beam_search


def _check_fields(request: Any, checks: FieldChecks) -> None:
    """Refuse what vLLM would drop: the OpenAI server lets through any field it does not know."""
    fields = type(request).model_fields
    # vLLM 0.31 defaults to watermarking where the server does it: only a client that says so itself asks for it.
    defaults = {n: None if fields[n].default is True else fields[n].default for n in WITHOUT_EFFECT if n in fields}
    said = {name: value for name, value in vars(request).items() if name in request.model_fields_set}
    as_validation_error(checks.fields, said, defaults, request.model_extra or {})
    for name, part in _parts(request):
        as_validation_error(
            checks.nested, name, {**dict(part), **(part.model_extra or {})}, type(part).model_fields.keys()
        )
    if request.stream and type(request).__name__ != "ResponsesRequest":
        snapshot_stream.expect_stream()


def _parts(request: Any) -> Iterator[tuple[str, Any]]:
    """Objects in a request that keep keys which nobody reads."""
    for name in ("response_format", "stream_options", "text", "reasoning"):
        part = getattr(request, name, None)
        if part is not None and hasattr(part, "model_extra"):
            yield name, part
            inner = {"response_format": "json_schema", "text": "format"}.get(name, "")
            deeper = getattr(part, inner, None)
            if hasattr(deeper, "model_extra"):
                yield f"{name}.{inner}", deeper


def install_request_check(architectures: frozenset[str], check: Callable[[Any, Any], None]) -> None:
    """Wrap ``InputProcessor.process_inputs``, once, for these and those of earlier calls.

    Called from the config hook, in the front end alone. A process may have models of several families in turn.
    """
    # Without it: LLM.generate accepts a canvas that does not fit; text models just stop at max_model_len, but a canvas
    # has its length from the start; and options that do not go with the server's fail in the scheduler, which ends the
    # engine. No hook: validators see sampling parameters without the prompt and without the configuration. Remove
    # when: a validator sees all of them.
    from vllm.v1.engine.input_processor import InputProcessor

    original, ours = InputProcessor.process_inputs, set(architectures)
    if _widened(original, architectures):
        return

    @functools.wraps(original)
    def process_inputs(self: InputProcessor, *args: Any, **kwargs: Any) -> Any:
        if (prepared := early_checks.request_of(*args)) is not None:
            return prepared
        request = original(self, *args, **kwargs)
        params = request.sampling_params
        if params is not None and not ours.isdisjoint(self.model_config.architectures):
            prompt_ends.watch(getattr(self, "tokenizer", None))
            stop_at_pad(params, self.model_config.hf_config, getattr(self, "tokenizer", None))
            as_validation_error(check, request, self.vllm_config)
            as_validation_error(snapshot_stream.check_listener, params.extra_args)
        return request

    setattr(process_inputs, _MARK, ours)
    InputProcessor.process_inputs = process_inputs


def _widened(wrapped: Any, architectures: frozenset[str]) -> bool:
    """Whether it is wrapped already; from now on it is for these architectures, too."""
    ours: set[str] | None = getattr(wrapped, _MARK, None)
    if ours is None:
        return False
    ours |= architectures
    return True
