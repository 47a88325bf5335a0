"""The server's routes, for our models only: what is asked of a request's body, and how a refusal is answered."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from vllm_d2cache.compat.internals import as_validation_error, loaded
from vllm_d2cache.requests.bodies import check_body
from vllm_d2cache.requests.naming import field_of, in_words_of

_MARK = "_vllm_d2cache"
# Class that answers a route -> its method, and the route. Subclasses convert requests of other protocols, which have
# been asked by then.
_ROUTES = {
    "vllm.entrypoints.openai.completion.serving.OpenAIServingCompletion": ("create_completion", "completions"),
    "vllm.entrypoints.openai.chat_completion.serving.OpenAIServingChat": ("create_chat_completion", "chat"),
    "vllm.entrypoints.openai.chat_completion.batch_serving.OpenAIServingChatBatch": (
        "create_batch_chat_completion",
        "batch",
    ),
    "vllm.entrypoints.openai.responses.serving.OpenAIServingResponses": ("create_responses", "responses"),
    "vllm.entrypoints.anthropic.serving.AnthropicServingMessages": ("create_messages", "messages"),
}


def install(only_for: type) -> None:
    """Wrap the routes that are loaded; idempotent.

    Args:
        only_for: type of the default sampling parameters of servers of our models.
    """
    # Without it: half a character (a lone surrogate) anywhere in a request is HTTP 500; /v1/messages drops fields that
    # it does not know, and writes what it refuses into the log, with the value; the batch route takes stream for
    # something else. No hook: request classes are made before plugins are loaded. Remove when: vLLM refuses these.
    for path, (method, route) in _ROUTES.items():
        cls = loaded(path)
        if cls is not None and not hasattr(vars(cls).get(method), _MARK):
            setattr(cls, method, _checked(cls, vars(cls)[method], route, only_for))


def _checked(cls: Any, original: Any, route: str, only_for: type) -> Any:
    @functools.wraps(original)
    async def create(self: Any, request: Any, raw_request: Any = None) -> Any:
        if type(self) is not cls or not isinstance(self.default_sampling_params, only_for):
            return await original(self, request, raw_request)
        try:
            if raw_request is not None:
                as_validation_error(check_body, route, await raw_request.body(), _fields(request), _nested())
            _null_is_default(request)
            return _named(await original(self, request, raw_request), request)
        except Exception as error:
            named = _with_field(error, request)
            if route == "messages":
                return _refusal(named)
            if named is error:
                raise
            raise named from error

    setattr(create, _MARK, True)
    return create


def _nested() -> dict[str, set[str]]:
    """Keys of objects whose class keeps no others."""
    from vllm.entrypoints.anthropic.protocol import AnthropicOutputConfig
    from vllm.sampling_params import StructuredOutputsParams

    grammar = {field.name for field in dataclasses.fields(StructuredOutputsParams) if not field.name.startswith("_")}
    return {"structured_outputs": grammar, "output_config": set(AnthropicOutputConfig.model_fields)}


def _null_is_default(request: Any) -> None:
    """Answers to /v1/responses repeat the request, and cannot repeat null where it says nothing."""
    for name in ("background", "truncation"):
        if name in request.model_fields_set and getattr(request, name, ...) is None:
            setattr(request, name, type(request).model_fields[name].default)


def _named(answer: Any, request: Any) -> Any:
    """An answer; an error names the field that it is about."""
    error = getattr(answer, "error", None)
    if error is not None and isinstance(getattr(error, "message", None), str):
        field = field_of(error.message, request.model_fields_set)
        message = in_words_of(error.message, request.model_fields_set)
        if field is not None:
            error.message, error.param = f"{field}: {error.message}", field
        elif message != error.message:
            error.message, error.param = message, message.partition(":")[0]
    return answer


def _with_field(error: Exception, request: Any) -> Exception:
    """The same refusal, naming the field that it is about; any other error as it is."""
    from vllm.exceptions import VLLMClientError, VLLMValidationError

    if not isinstance(error, ValueError | TypeError | VLLMClientError):
        return error
    message = str(error.args[0] if isinstance(error, VLLMValidationError) else error)
    field = field_of(message, request.model_fields_set)
    own = in_words_of(message, request.model_fields_set) if field is None else f"{field}: {message}"
    return error if own == message else VLLMValidationError(own, parameter=own.partition(":")[0])


def _fields(request: Any) -> set[str]:
    """Names that a body may have for the fields of a request's class."""
    fields = type(request).model_fields
    return {*fields, *(field.alias for field in fields.values() if field.alias)}


def _refusal(error: Exception) -> Any:
    """The answer to a bad request, which that route would log with a traceback; what is no refusal is raised again."""
    from vllm.entrypoints.serve.exception_handling.error_response import create_error_response

    answer = create_error_response(error)
    if answer.error.code >= 500:
        raise error
    return answer
