"""The server's routes, for our models only: what is asked of a request's body, and how a refusal is answered."""

from __future__ import annotations

import functools
from typing import Any

from vllm_d2cache.compat.internals import as_validation_error, loaded
from vllm_d2cache.requests.bodies import check_body

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
                as_validation_error(check_body, route, await raw_request.body(), _fields(request))
            return await original(self, request, raw_request)
        except Exception as error:
            if route != "messages":
                raise
            return _refusal(error)

    setattr(create, _MARK, True)
    return create


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
