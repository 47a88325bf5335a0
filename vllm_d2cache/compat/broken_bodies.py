"""Fields that vLLM's request classes break on, or refuse without their name: HTTP 400 that names them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from vllm_d2cache.compat.internals import loaded
from vllm_d2cache.requests.naming import field_of

_MARK = "_vllm_d2cache"
_APP = "vllm.entrypoints.launchers.app"
# What vLLM's checks raise where they take a field for what it should be.
_ERRORS = (AttributeError, TypeError)
# Route -> class of its requests.
_CLASSES = {
    "/v1/completions": "vllm.entrypoints.openai.completion.protocol.CompletionRequest",
    "/v1/chat/completions": "vllm.entrypoints.openai.chat_completion.protocol.ChatCompletionRequest",
    "/v1/chat/completions/batch": "vllm.entrypoints.openai.chat_completion.protocol.BatchChatCompletionRequest",
    "/v1/responses": "vllm.entrypoints.openai.responses.protocol.ResponsesRequest",
    "/v1/messages": "vllm.entrypoints.anthropic.protocol.AnthropicMessagesRequest",
}


def install(architectures: frozenset[str]) -> None:
    """Have the server that this process builds next handle such errors; idempotent. By the config hook."""
    # Without it: `"structured_outputs": "x"` is HTTP 500 and a traceback, `"messages": null` names no field. No hook:
    # request classes run checks of their own before they look at types, and are made before plugins are loaded. Remove
    # when: vLLM's checks look at types first.
    app: Any = sys.modules.get(_APP)
    if app is None or hasattr(app.init_exception_handler, _MARK):
        return
    stock = app.init_exception_handler

    def init_exception_handler(server: Any) -> None:
        from vllm.exceptions import VLLMClientError, VLLMError

        stock(server)
        for kind in _ERRORS:
            server.exception_handler(kind)(_handler(architectures, server.exception_handlers.get(kind)))
        server.exception_handler(VLLMClientError)(_handler(architectures, server.exception_handlers[VLLMError]))

    setattr(init_exception_handler, _MARK, True)
    app.init_exception_handler = init_exception_handler


def _handler(architectures: frozenset[str], stock: Any) -> Any:
    async def handle(request: Any, error: Exception) -> Any:
        config = getattr(request.app.state, "vllm_config", None)
        if config is not None and not architectures.isdisjoint(config.model_config.architectures):
            message = await _problem(request, error)
            if message is not None:
                return _refusal(message)
        if stock is None:
            raise error
        return await stock(request, error)

    return handle


async def _problem(request: Any, error: Exception) -> str | None:
    """What is wrong with the body, naming the field; None if nobody knows, or the error says it."""
    cls = loaded(_CLASSES.get(request.url.path, "."))
    try:
        body = await request.json()
    except ValueError:
        return None
    if cls is None or not isinstance(body, dict):
        return None
    if isinstance(error, _ERRORS):
        return next(_wrong_types(cls, body), None)
    field = field_of(str(error), body.keys()) if getattr(error, "parameter", None) is None else None
    return None if field is None else f"{field}: {error}"


def _wrong_types(cls: Any, body: dict[str, Any]) -> Iterator[str]:
    from pydantic import TypeAdapter, ValidationError

    for name, field in cls.model_fields.items():
        if name in body:
            try:
                TypeAdapter(field.annotation).validate_python(body[name])
            except ValidationError as error:
                yield f"{name}: {error.errors()[0]['msg']}, got {type(body[name]).__name__}"


def _refusal(message: str) -> Any:
    from fastapi.responses import JSONResponse
    from vllm.entrypoints.serve.exception_handling.error_response import create_error_response

    answer = create_error_response(message, param=message.partition(":")[0])
    return JSONResponse(answer.model_dump(), status_code=answer.error.code)
