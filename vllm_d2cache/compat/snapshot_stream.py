"""Snapshots on their way from the engine to a streaming client, past everything that vLLM does with tokens.

The scheduler sends them as outputs of their own. Here they are taken out before vLLM's output processor sees them, and
laid into the inbox of the stream that asked; the stream sends them as events between vLLM's own chunks. A stream is
known by the task that runs it, not by a request id, which clients may choose: nobody can ask for another's snapshots.
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
import inspect
import json
from collections.abc import AsyncGenerator, Callable
from typing import Any

from vllm_d2cache.compat.internals import take_snapshot
from vllm_d2cache.observe.snapshots import pieces
from vllm_d2cache.options.request import SNAPSHOTS
from vllm_d2cache.options.types import OptionError
from vllm_d2cache.requests.asked import snapshot_interval

EVENT = "d2cache.snapshot"
_MARK = "_vllm_d2cache"


class Inbox:
    """The newest snapshot of each choice that its client has not been sent: a slow client skips some."""

    def __init__(self) -> None:
        self._newest: dict[int, dict[str, Any]] = {}
        self._filled = asyncio.Event()

    def put(self, index: int, snapshot: dict[str, Any]) -> None:
        """Replace the snapshot of choice ``index``."""
        self._newest[index] = snapshot
        self._filled.set()

    def take(self) -> list[tuple[int, dict[str, Any]]]:
        """All that is there, by choice."""
        taken = sorted(self._newest.items())
        self._newest.clear()
        self._filled.clear()
        return taken

    async def wait(self) -> None:
        """Return when there is something."""
        await self._filled.wait()


# The inbox of the stream that the current task works for.
_inbox: contextvars.ContextVar[Inbox | None] = contextvars.ContextVar("vllm_d2cache_inbox", default=None)
# The current task answers a request of a route that sends snapshots, with a stream.
_streams: contextvars.ContextVar[bool] = contextvars.ContextVar("vllm_d2cache_streams", default=False)


def expect_stream() -> None:
    """The request that the current task answers streams, and snapshots would be sent."""
    _streams.set(True)


def check_listener(extra_args: dict[str, Any] | None) -> None:
    """Refuse snapshots that nobody would be sent.

    Raises:
        OptionError: the request asks for snapshots and is no stream that sends them.
    """
    if snapshot_interval(extra_args) and not _streams.get():
        raise _no_listener()


def _no_listener() -> OptionError:
    return OptionError(
        f"{SNAPSHOTS}: comes with a completion or chat completion of the server that has stream true alone; "
        "leave it out (0)"
    )


def install(serving: type, name: str, only_for: type) -> None:
    """Let the stream generator ``serving.name`` send snapshots, and vLLM's output processor pass them by; idempotent.

    Subclasses serve other protocols and send none: a generator of their own (vLLM 0.33) refuses a request for some.

    Args:
        only_for: type of the default sampling parameters of servers that have snapshots.
    """
    # Without it: there is no way for anything but tokens to a stream. No hook: streams are vLLM's own generators, and
    # the output processor makes text of whatever comes. Remove when: a plugin may add events to a stream.
    from vllm.v1.engine.output_processor import OutputProcessor, RequestOutputCollector

    _wrap(RequestOutputCollector, "__init__", _remember_inbox)
    _wrap(OutputProcessor, "process_outputs", _divert_snapshots)
    for cls in (serving, *_subclasses(serving)):
        if name in vars(cls):
            _wrap(cls, name, functools.partial(_add_snapshots, serving, only_for))


def _subclasses(cls: type) -> list[type]:
    found: list[type] = cls.__subclasses__()
    return [*found, *(deeper for sub in found for deeper in _subclasses(sub))]


def _wrap(cls: type, name: str, wrapper: Callable[[Any], Any]) -> None:
    original = getattr(cls, name)
    if not hasattr(original, _MARK):
        wrapped = functools.wraps(original)(wrapper(original))
        setattr(wrapped, _MARK, True)
        setattr(cls, name, wrapped)


def _remember_inbox(original: Any) -> Any:
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        self.d2cache_inbox = _inbox.get()  # the task that makes a collector is the one that will read it

    return __init__


def _divert_snapshots(original: Any) -> Any:
    def process_outputs(self: Any, engine_core_outputs: list[Any], *args: Any, **kwargs: Any) -> Any:
        rest = [output for output in engine_core_outputs if not _diverted(self, output)]
        return original(self, rest, *args, **kwargs)

    return process_outputs


def _diverted(processor: Any, output: Any) -> bool:
    snapshot = take_snapshot(output)
    if snapshot is None:
        return False
    # A request that has ended, or was aborted by a stop string or its client, has no state any more.
    state = processor.request_states.get(output.request_id)
    inbox = None if state is None else getattr(state.queue, "d2cache_inbox", None)
    if inbox is not None:
        inbox.put(state.request_index, snapshot)
    return True


def _add_snapshots(serving: type, only_for: type, original: Any) -> Any:
    signature = inspect.signature(original)

    def stream_generator(self: Any, request: Any, *args: Any, **kwargs: Any) -> AsyncGenerator[str, None]:
        chunks = original(self, request, *args, **kwargs)
        if not isinstance(self.default_sampling_params, only_for) or not _wants_snapshots(request, self, serving):
            return chunks
        call = signature.bind(self, request, *args, **kwargs).arguments
        return with_snapshots(chunks, functools.partial(_event, request, call))

    return stream_generator


def _wants_snapshots(request: Any, server: Any, serving: type) -> bool:
    """Whether to send any. What is wrong is said now, before the stream has begun with HTTP 200."""
    from vllm.exceptions import VLLMValidationError

    try:
        wanted = snapshot_interval(request.vllm_xargs) > 0
        if wanted and type(server) is not serving:  # subclasses rewrite the chunks into those of other protocols
            raise _no_listener()
        return wanted
    except OptionError as error:
        raise VLLMValidationError(str(error), parameter=SNAPSHOTS) from error


def _event(request: Any, call: dict[str, Any], index: int, snapshot: dict[str, Any]) -> str:
    """A snapshot as a server-sent event, shaped like a chunk without choices for clients that read every event."""
    described = {"index": index, **snapshot}
    if (tokenizer := call["tokenizer"]) is not None:
        decode = functools.partial(tokenizer.decode, skip_special_tokens=request.skip_special_tokens)
        described["pieces"] = pieces(snapshot["canvas"], decode)
    body = {
        "id": call["request_id"],
        "object": EVENT,
        "model": call["model_name"],
        "choices": [],
        "d2cache_snapshot": described,
    }
    return f"event: {EVENT}\ndata: {json.dumps(body)}\n\n"


async def with_snapshots(
    chunks: AsyncGenerator[str, None], event: Callable[[int, dict[str, Any]], str]
) -> AsyncGenerator[str, None]:
    """vLLM's chunks in their order, and between them the snapshots that come while it works on the next one.

    Args:
        chunks: whatever it starts, while it runs, delivers its snapshots here.
        event: makes the event of a choice's snapshot.
    """
    inbox = Inbox()
    context = contextvars.copy_context()
    context.run(_inbox.set, inbox)
    loop = asyncio.get_running_loop()
    chunk: asyncio.Task[str | None] | None = None
    news: asyncio.Task[None] | None = None
    try:
        while True:
            chunk = chunk or loop.create_task(_next(chunks), context=context)
            news = news or loop.create_task(inbox.wait())
            await asyncio.wait((chunk, news), return_when=asyncio.FIRST_COMPLETED)
            if chunk.done() and chunk.result() is None:
                return
            for index, snapshot in inbox.take():  # those of a step before the chunk of that step
                yield event(index, snapshot)
            if news.done():
                news = None
            if chunk.done():
                text = chunk.result()
                chunk = None
                assert text is not None
                yield text
    finally:
        left = [task for task in (chunk, news) if task is not None]
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)
        await chunks.aclose()


async def _next(chunks: AsyncGenerator[str, None]) -> str | None:
    return await anext(chunks, None)
