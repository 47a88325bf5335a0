"""A request is checked before its stream begins: refused with HTTP 400, like one that does not stream.

vLLM makes sense of a request when somebody first waits for its output. For a stream that is after the server has said
HTTP 200, and what is refused then is an event, or a connection that ends, and a traceback in the log.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import AsyncGenerator
from typing import Any

from vllm_d2cache.compat.internals import loaded

_MARK = "_vllm_d2cache"
_ENGINE = "vllm.v1.engine.async_llm.AsyncLLM"
_RESPONSES = "vllm.entrypoints.openai.responses.serving.OpenAIServingResponses"
# What of a call for output the request is made from.
_SETTINGS = (
    *("lora_request", "tokenization_kwargs", "trace_headers", "priority", "data_parallel_rank", "session_id"),
    "kv_hints",
)


class Prepared(dict[str, Any]):
    """A prompt as vLLM's renderer makes it, and the request that was made of it.

    Attributes:
        request: vLLM's EngineCoreRequest.
    """

    request: Any


def request_of(*args: Any) -> Any:
    """The request that is there already, of the arguments of ``InputProcessor.process_inputs``; else None."""
    return args[1].request if len(args) > 1 and isinstance(args[1], Prepared) else None


def install(architectures: frozenset[str]) -> None:
    """Wrap ``AsyncLLM.generate`` and the responses route's use of it, where they are loaded; idempotent."""
    # Without it: see above. No hook: vLLM checks a request in an asynchronous generator, which does nothing before it
    # is iterated. Remove when: routes have it checked before they answer.
    engine, responses = loaded(_ENGINE), loaded(_RESPONSES)
    if engine is not None and not hasattr(engine.generate, _MARK):
        engine.generate = _prepared_first(engine.generate, architectures)
    if responses is not None and not hasattr(responses._generate_with_builtin_tools, _MARK):
        stock = responses._generate_with_builtin_tools
        responses._generate_with_builtin_tools = _checked_first(stock, architectures)


def _prepared_first(original: Any, architectures: frozenset[str]) -> Any:
    @functools.wraps(original)
    def generate(
        self: Any, prompt: Any, sampling_params: Any, request_id: str, **settings: Any
    ) -> AsyncGenerator[Any, None]:
        if not architectures.isdisjoint(self.model_config.architectures) and _is_rendered(prompt):
            prepared = Prepared(prompt)
            prepared.request = _request(self, prompt, sampling_params, request_id, settings)
            prompt = prepared
        return original(self, prompt, sampling_params, request_id, **settings)

    setattr(generate, _MARK, True)
    return generate


def _checked_first(original: Any, architectures: frozenset[str]) -> Any:
    """The responses route asks for output inside another generator; the first turn's request is checked twice there."""
    signature = inspect.signature(original)

    @functools.wraps(original)
    def _generate_with_builtin_tools(self: Any, *args: Any, **kwargs: Any) -> AsyncGenerator[Any, None]:
        if not architectures.isdisjoint(self.model_config.architectures):
            call = signature.bind(self, *args, **kwargs).arguments
            _request(self.engine_client, call["engine_input"], call["sampling_params"], call["request_id"], call)
        return original(self, *args, **kwargs)

    setattr(_generate_with_builtin_tools, _MARK, True)
    return _generate_with_builtin_tools


def _is_rendered(prompt: Any) -> bool:
    return isinstance(prompt, dict) and "type" in prompt and not isinstance(prompt, Prepared)


def _request(engine: Any, prompt: Any, params: Any, request_id: str, settings: dict[str, Any]) -> Any:
    """What vLLM makes of these, as it would itself in a moment.

    Raises:
        ValueError: it is refused.
    """
    given = {name: settings[name] for name in _SETTINGS if name in settings}
    if engine.observability_config.otlp_traces_endpoint is None:
        given.pop("trace_headers", None)
    return engine.input_processor.process_inputs(request_id, prompt, params, supported_tasks=("generate",), **given)
