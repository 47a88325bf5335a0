"""Patches of vLLM's front end, for our architectures only: the default canvas, and requests that do not fit.

All three start from the dictionary of default sampling parameters that vLLM asks the model configuration for: for our
models it is a :class:`CanvasDefaults`, and what is wrapped further down looks for that type. A server of another model
in the same environment never sees one.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

from vllm_d2cache.config import (
    DEFAULT_CANVAS_LENGTH,
    SECTION,
    OptionError,
    parse_request_options,
    parse_server_options,
)

_MARK = "_vllm_d2cache"
# Request classes of the OpenAI server, and the fields in which a client may give the canvas length.
_PROTOCOLS = {
    "vllm.entrypoints.openai.completion.protocol.CompletionRequest": ("max_tokens",),
    "vllm.entrypoints.openai.chat_completion.protocol.ChatCompletionRequest": (
        "max_completion_tokens",
        "max_tokens",
    ),
    "vllm.entrypoints.openai.responses.protocol.ResponsesRequest": ("max_output_tokens",),
}


class CanvasDefaults(dict[str, Any]):
    """Default sampling parameters of a model whose max_tokens is a canvas."""


def install(architectures: frozenset[str]) -> None:
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
        _patch_protocols()
        return CanvasDefaults({"max_tokens": DEFAULT_CANVAS_LENGTH, "temperature": 0.0, **params})

    setattr(get_diff_sampling_param, _MARK, True)
    ModelConfig.get_diff_sampling_param = get_diff_sampling_param


def _patch_protocols() -> None:
    """Wrap the request classes that are loaded (none is, offline)."""
    for path, names in _PROTOCOLS.items():
        module, _, name = path.rpartition(".")
        cls = getattr(sys.modules.get(module), name, None)
        if cls is not None and not hasattr(cls.to_sampling_params, _MARK):
            _patch_online_length(cls, names)
            if name == "CompletionRequest":
                # Without it: a completion without max_tokens gets 16, before anybody asks for defaults. No hook: a
                # field's default. Remove when: the server asks the model's defaults here as it does for chat.
                cls.model_fields["max_tokens"].default = DEFAULT_CANVAS_LENGTH


def _patch_online_length(cls: type, names: tuple[str, ...]) -> None:
    # Without it: a canvas that does not fit behind the prompt is silently cut to what fits, which changes the result
    # of a diffusion model. No hook: get_max_tokens takes the minimum before parameters exist. Remove when: vLLM can be
    # told to refuse instead.
    original = cls.to_sampling_params

    @functools.wraps(original)
    def to_sampling_params(self: Any, max_tokens: int, default_sampling_params: dict[str, Any] | None = None) -> Any:
        if isinstance(default_sampling_params, CanvasDefaults):
            # vars: reading a deprecated field as an attribute warns.
            asked = next(((n, vars(self)[n]) for n in names if vars(self).get(n) is not None), None)
            if asked is not None and asked[1] > max_tokens:
                raise _does_not_fit(*asked, max_tokens)
        return original(self, max_tokens, default_sampling_params)

    setattr(to_sampling_params, _MARK, True)
    cls.to_sampling_params = to_sampling_params


def install_request_check(architectures: frozenset[str]) -> None:
    """Wrap ``InputProcessor.process_inputs``; idempotent. Called from the config hook, in the front end alone."""
    # Without it: LLM.generate accepts a canvas that does not fit; text models just stop at max_model_len, but a canvas
    # has its length from the start; and options that do not go with the server's fail in the scheduler, which ends the
    # engine. No hook: validators see sampling parameters without the prompt and without the configuration. Remove
    # when: a validator sees all of them.
    from vllm.v1.engine.input_processor import InputProcessor

    original = InputProcessor.process_inputs
    if hasattr(original, _MARK):
        return

    @functools.wraps(original)
    def process_inputs(self: InputProcessor, *args: Any, **kwargs: Any) -> Any:
        request = original(self, *args, **kwargs)
        params = request.sampling_params
        if params is not None and not architectures.isdisjoint(self.model_config.architectures):
            room = self.model_config.max_model_len - len(request.prompt_token_ids)
            if params.max_tokens > room:
                raise _does_not_fit("max_tokens", params.max_tokens, room)
            _check_options(self.vllm_config.additional_config, params, room)
        return request

    setattr(process_inputs, _MARK, True)
    InputProcessor.process_inputs = process_inputs


def _check_options(additional_config: Any, params: Any, room: int) -> None:
    """Refuse options that do not go together, the server's included, or not with the canvas."""
    from vllm.exceptions import VLLMValidationError

    server = parse_server_options(additional_config.get(SECTION) if isinstance(additional_config, dict) else None)
    try:
        options = server.resolve(parse_request_options(params.extra_args))
        options.check_canvas(params.max_tokens, room)
    except OptionError as error:
        raise VLLMValidationError(str(error)) from error


def _does_not_fit(field: str, asked: int, room: int) -> Exception:
    from vllm.exceptions import VLLMValidationError

    return VLLMValidationError(
        f"{field}: a canvas of {asked} positions does not fit behind this prompt; valid values are 1 to {room}",
        parameter=field,
        value=asked,
    )
