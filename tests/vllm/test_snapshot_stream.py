"""Snapshots past vLLM's output processor and into a stream: our half, and what vLLM must still do for it."""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import json
from collections.abc import AsyncGenerator, Callable
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine import EngineCoreOutput
from vllm.v1.engine.output_processor import OutputProcessor, RequestOutputCollector

from vllm_d2cache.compat import snapshot_stream
from vllm_d2cache.compat.front_end import _STREAMS, CanvasDefaults
from vllm_d2cache.compat.internals import snapshot_output, take_snapshot
from vllm_d2cache.compat.snapshot_stream import Inbox, check_listener, with_snapshots
from vllm_d2cache.options.types import OptionError

pytestmark = pytest.mark.vllm
WANTED = {"d2cache_snapshots": 1}


@pytest.fixture(autouse=True)
def _unpatched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test installs anew on vLLM's own functions."""
    for cls, name in [
        (RequestOutputCollector, "__init__"),
        (OutputProcessor, "process_outputs"),
        (OpenAIServingCompletion, "completion_stream_generator"),
        (OpenAIServingChat, "chat_completion_stream_generator"),
    ]:
        monkeypatch.setattr(cls, name, inspect.unwrap(getattr(cls, name)))


def event(index: int, snapshot: dict[str, Any]) -> str:
    return f"{index}:{snapshot['step']}"


async def collect(chunks: AsyncGenerator[str, None]) -> list[str]:
    return [text async for text in with_snapshots(chunks, event)]


def listener() -> Inbox:
    """The inbox of the stream that the caller works for."""
    inbox = snapshot_stream._inbox.get()
    assert inbox is not None
    return inbox


# --- one stream ----------------------------------------------------------------------------------------------------


def test_a_snapshot_comes_before_the_chunk_of_its_step_and_the_newest_replaces_others() -> None:
    async def chunks() -> AsyncGenerator[str, None]:
        for step in range(3):
            listener().put(0, {"step": step})
            yield f"chunk {step}"
        for step in range(3, 6):  # steps without a token, faster than they are sent
            listener().put(0, {"step": step})
            listener().put(1, {"step": step})
        yield "chunk 5"

    assert asyncio.run(collect(chunks())) == [
        "0:0",
        "chunk 0",
        "0:1",
        "chunk 1",
        "0:2",
        "chunk 2",
        "0:5",
        "1:5",
        "chunk 5",
    ]


def test_snapshots_are_sent_while_no_chunk_comes() -> None:
    async def chunks() -> AsyncGenerator[str, None]:
        inbox = listener()
        for step in range(3):
            inbox.put(0, {"step": step})
            await asyncio.sleep(0.01)
        yield "chunk"

    assert asyncio.run(collect(chunks())) == ["0:0", "0:1", "0:2", "chunk"]


def test_nothing_comes_after_the_last_chunk() -> None:
    async def chunks() -> AsyncGenerator[str, None]:
        yield "[DONE]"
        listener().put(0, {"step": 1})

    assert asyncio.run(collect(chunks())) == ["[DONE]"]


def test_streams_do_not_see_each_other() -> None:
    async def chunks(step: int) -> AsyncGenerator[str, None]:
        for _ in range(3):
            listener().put(0, {"step": step})
            await asyncio.sleep(0)
        yield "end"

    async def both() -> list[list[str]]:
        return await asyncio.gather(collect(chunks(1)), collect(chunks(2)))

    one, two = asyncio.run(both())
    assert set(one) == {"0:1", "end"}
    assert set(two) == {"0:2", "end"}
    assert snapshot_stream._inbox.get() is None


@pytest.mark.parametrize("hang_up", ["close", "cancel"])
def test_a_client_that_goes_away_ends_vllms_generator(hang_up: str) -> None:
    """vLLM aborts the request when its generator is cancelled or closed."""
    ended: list[type[BaseException]] = []

    async def chunks() -> AsyncGenerator[str, None]:
        try:
            yield "first"
            await asyncio.sleep(60)
        except BaseException as error:
            ended.append(type(error))
            raise

    async def client() -> None:
        stream = with_snapshots(chunks(), event)
        assert await anext(stream) == "first"
        if hang_up == "close":
            await stream.aclose()
        else:
            reader = asyncio.create_task(anext(stream))
            await asyncio.sleep(0.01)
            reader.cancel()
            with pytest.raises(asyncio.CancelledError):
                await reader
        assert len(asyncio.all_tasks()) == 1  # this one

    asyncio.run(client())
    assert ended == [GeneratorExit if hang_up == "close" else asyncio.CancelledError]


def test_an_error_of_vllms_generator_is_the_streams() -> None:
    async def chunks() -> AsyncGenerator[str, None]:
        yield "first"
        raise RuntimeError("engine")

    async def run() -> None:
        with pytest.raises(RuntimeError, match="engine"):
            await collect(chunks())
        assert len(asyncio.all_tasks()) == 1  # this one

    asyncio.run(run())


# --- vLLM's classes ------------------------------------------------------------------------------------------------


def install() -> None:
    for cls in (OpenAIServingCompletion, OpenAIServingChat):
        path = f"{cls.__module__}.{cls.__qualname__}"
        snapshot_stream.install(cls, _STREAMS[path], CanvasDefaults)


def test_installing_twice_is_installing_once() -> None:
    install()
    once = OutputProcessor.process_outputs, RequestOutputCollector.__init__
    install()
    assert (OutputProcessor.process_outputs, RequestOutputCollector.__init__) == once


def test_snapshots_reach_the_collectors_stream_and_nothing_of_vllms(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[EngineCoreOutput] = []
    monkeypatch.setattr(OutputProcessor, "process_outputs", lambda self, outputs, *rest: seen.extend(outputs))
    install()

    async def chunks() -> AsyncGenerator[str, None]:
        mine = RequestOutputCollector(RequestOutputKind.DELTA, "a")
        states = {"a": SimpleNamespace(queue=mine, request_index=2), "b": SimpleNamespace(queue=other, request_index=0)}
        outputs = [snapshot_output(name, 4, [5, -1]) for name in ("a", "b", "gone")]
        OutputProcessor.process_outputs(SimpleNamespace(request_states=states), [*outputs, token], None)
        yield "chunk"

    token = EngineCoreOutput("a", [7], kv_transfer_params={"d2cache": {}})  # a report is vLLM's to deliver

    async def run() -> list[str]:
        nonlocal other
        other = RequestOutputCollector(RequestOutputKind.DELTA, "b")  # of a request that no stream works for
        return await collect(chunks())

    other: Any = None
    assert asyncio.run(run()) == ["2:4", "chunk"]
    assert seen == [token]


def test_a_snapshot_survives_the_way_between_the_processes() -> None:
    sent = msgspec.msgpack.encode(snapshot_output("a", 3, [5, -1]))
    got = msgspec.msgpack.decode(sent, type=EngineCoreOutput)
    assert take_snapshot(got) == {"step": 3, "canvas": [5, -1]}
    assert take_snapshot(EngineCoreOutput("a", [1])) is None


async def _two_chunks(self: Any, request: Any, **call: Any) -> AsyncGenerator[str, None]:
    listening = snapshot_stream._inbox.get()
    if listening is not None:
        listening.put(0, {"step": 1, "canvas": [1, -1, -1, 0]})
    yield "data: one\n\n"


@pytest.mark.parametrize("cls", [OpenAIServingCompletion, OpenAIServingChat])
def test_events_of_vllms_streams(cls: type, monkeypatch: pytest.MonkeyPatch) -> None:
    name = _STREAMS[f"{cls.__module__}.{cls.__qualname__}"]
    signature = inspect.signature(getattr(cls, name))
    assert {"request", "request_id", "model_name", "tokenizer"} <= set(signature.parameters)
    decode: Callable[..., str] = lambda ids, skip_special_tokens: "".join("é<"[i] for i in ids)  # noqa: E731
    call = {"request_id": "id-1", "model_name": "tiny", "tokenizer": SimpleNamespace(decode=decode)}
    stand_in = _two_chunks
    stand_in.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [inspect.Parameter(n, inspect.Parameter.POSITIONAL_OR_KEYWORD) for n in ("self", "request", *call)]
    )
    monkeypatch.setattr(cls, name, stand_in)
    install()

    def stream(defaults: dict[str, Any], xargs: dict[str, Any] | None, kind: type = cls) -> list[str]:
        serving = kind.__new__(kind)
        serving.default_sampling_params = defaults

        async def run() -> list[str]:
            request = SimpleNamespace(vllm_xargs=xargs, skip_special_tokens=True)
            return [text async for text in getattr(serving, name)(request, **call)]

        return asyncio.run(run())

    plain = ["data: one\n\n"]
    ours = CanvasDefaults({})
    first, *rest = stream(ours, WANTED)
    assert rest == plain
    head, _, data = first.partition("\n")
    assert head == "event: d2cache.snapshot"
    assert json.loads(data.removeprefix("data: ")) == {
        "id": "id-1",
        "object": "d2cache.snapshot",
        "model": "tiny",
        "choices": [],
        "d2cache_snapshot": {
            "index": 0,
            "step": 1,
            "canvas": [1, -1, -1, 0],
            "pieces": [{"text": "<"}, {"masks": 2}, {"text": "é"}],
        },
    }
    assert stream(ours, None) == stream(ours, {"d2cache_snapshots": 0}) == plain
    assert stream({}, WANTED) == plain, "another model"
    with pytest.raises(VLLMValidationError, match="d2cache_snapshots: comes with"):
        stream(ours, WANTED, type("Rewrites", (cls,), {}))
    with pytest.raises(VLLMValidationError, match="d2cache_snapshots: must be an integer") as caught:
        stream(ours, {"d2cache_snapshots": -1})
    assert caught.value.parameter == "d2cache_snapshots"


def test_a_subclass_with_a_stream_of_its_own_refuses_snapshots(monkeypatch: pytest.MonkeyPatch) -> None:
    """As vLLM 0.33 has it: /v1/messages makes its events from vLLM's chunks, not from the text of a chat's stream."""
    kinds = [
        type("Own", (OpenAIServingChat,), {"chat_completion_stream_generator": _two_chunks}),
        type("Inherited", (OpenAIServingChat,), {}),
    ]
    kinds.append(type("Deeper", (kinds[1],), {"chat_completion_stream_generator": _two_chunks}))
    monkeypatch.setattr(OpenAIServingChat, "chat_completion_stream_generator", _two_chunks)
    install()
    install()
    for kind in kinds:
        server = kind.__new__(kind)
        server.default_sampling_params = CanvasDefaults({})
        with pytest.raises(VLLMValidationError, match="d2cache_snapshots: comes with"):
            server.chat_completion_stream_generator(SimpleNamespace(vllm_xargs=WANTED))
        server.default_sampling_params = {}
        server.chat_completion_stream_generator(SimpleNamespace(vllm_xargs=WANTED))  # another model


def test_a_request_that_no_stream_works_for_is_refused() -> None:
    check_listener({})
    with pytest.raises(OptionError, match="d2cache_snapshots: comes with"):
        check_listener(WANTED)

    def answers_a_stream() -> None:
        snapshot_stream.expect_stream()
        check_listener(WANTED)

    contextvars.copy_context().run(answers_a_stream)
    with pytest.raises(OptionError, match="d2cache_snapshots: comes with"):
        check_listener(WANTED)


def test_vllm_still_does_its_half() -> None:
    """A collector is made by the task that iterates the stream, after the check; outputs find it by their request."""
    from vllm.v1.engine.async_llm import AsyncLLM

    source = inspect.getsource(AsyncLLM.add_request)
    assert source.index(".process_inputs(") < source.index("RequestOutputCollector(")
    assert "await self.add_request(" in inspect.getsource(AsyncLLM.generate)
    handler = inspect.getsource(AsyncLLM._run_output_handler)
    assert "output_processor.process_outputs(" in handler
    assert "self.request_states.get(req_id)" in inspect.getsource(OutputProcessor.process_outputs)
