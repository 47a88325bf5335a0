"""vLLM's whole front end behind HTTP, on an engine that writes the same token into every canvas: seconds to start."""

from __future__ import annotations

import asyncio
import contextlib
import io
import logging
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import uvicorn

TINY = str(Path(__file__).resolve().parents[2] / "models" / "tiny-llada")
TOKEN = 7


class Core:
    """Stands in for the engine's processes.

    Attributes:
        requests: all that were admitted.
    """

    engine_ranks_managed = (0,)

    def __init__(self, **_: Any) -> None:
        from vllm.v1.serial_utils import MsgpackEncoder

        self.requests: list[Any] = []
        self.resources = SimpleNamespace(engine_dead=False)
        self._encode = MsgpackEncoder().encode
        self._outputs: asyncio.Queue[Any] = asyncio.Queue()

    def __getattr__(self, name: str) -> Any:
        async def nothing(*args: Any, **kwargs: Any) -> None:
            return None

        if name.endswith("_async"):
            return nothing
        raise AttributeError(name)

    async def get_supported_tasks_async(self) -> tuple[str, ...]:
        return ("generate",)

    async def add_request_async(self, request: Any) -> None:
        """Answer it at once."""
        from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason

        self._encode(request)  # it would cross to another process
        self.requests.append(request)
        canvas = [TOKEN] * request.sampling_params.max_tokens
        logprobs = _logprobs(len(canvas)) if request.sampling_params.logprobs is not None else None
        done = EngineCoreOutput(request.request_id, canvas, new_logprobs=logprobs, finish_reason=FinishReason.LENGTH)
        await self._outputs.put(EngineCoreOutputs(outputs=[done]))

    async def get_output_async(self) -> Any:
        return await self._outputs.get()

    def shutdown(self, timeout: float | None = None) -> None:
        pass


def _logprobs(count: int) -> Any:
    import numpy as np
    from vllm.v1.outputs import LogprobsLists

    ids = np.full((count, 1), TOKEN)
    return LogprobsLists(ids, np.zeros((count, 1), np.float32), np.ones(count, np.int64))


@dataclass
class FrontEnd:
    """A running front end."""

    url: str
    core: Core
    _log: io.StringIO = field(default_factory=io.StringIO)

    @property
    def log(self) -> str:
        """All that the server has logged, at any level that is on."""
        return self._log.getvalue()

    def post(self, path: str, body: Any) -> httpx.Response:
        """POST JSON, or bytes as they are."""
        content = {"content": body} if isinstance(body, bytes) else {"json": body}
        return httpx.post(f"{self.url}{path}", **content, headers={"Content-Type": "application/json"}, timeout=60)


@contextlib.contextmanager
def front_end(monkeypatch: pytest.MonkeyPatch, model: str = TINY, *flags: str) -> Iterator[FrontEnd]:
    """Serve ``model`` with these flags of ``vllm serve``."""
    import vllm.entrypoints.launchers.app  # noqa: F401  # as `vllm serve` does, before there is a configuration
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser
    from vllm.v1.engine import async_llm

    monkeypatch.setattr(async_llm.EngineCoreClient, "make_async_mp_client", staticmethod(lambda **kw: Core()))
    parser = _cli_args().make_arg_parser(FlexibleArgumentParser())
    args = parser.parse_args(["--model", model, "--port", "0", *flags])
    log = io.StringIO()
    handler = logging.StreamHandler(log)
    loggers = [logging.getLogger(name) for name in ("", "vllm", "uvicorn", "uvicorn.error")]
    for logger in loggers:
        logger.addHandler(handler)
    config = AsyncEngineArgs.from_cli_args(args).create_engine_config()
    started: dict[str, Any] = {}
    thread = threading.Thread(target=_serve, args=(args, config, started), daemon=True)
    thread.start()
    while not (server := started.get("server")) or not server.started:
        assert thread.is_alive(), log.getvalue()[-3000:]
        time.sleep(0.05)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield FrontEnd(f"http://127.0.0.1:{port}", started["engine"].engine_core, log)
    finally:
        server.should_exit = True
        thread.join(20)
        for logger in loggers:
            logger.removeHandler(handler)


def _cli_args() -> Any:
    """vLLM's module with the flags of ``vllm serve``."""
    try:
        from vllm.entrypoints.common import cli_args  # vLLM 0.33
    except ImportError:
        from vllm.entrypoints.launchers import cli_args
    return cli_args


def _serve(args: Any, config: Any, started: dict[str, Any]) -> None:
    asyncio.run(_serve_until_told(args, config, started))


async def _serve_until_told(args: Any, config: Any, started: dict[str, Any]) -> None:
    from vllm.entrypoints.launchers.api_server.app_state import init_app_state
    from vllm.entrypoints.launchers.app import build_app
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.executor import Executor

    engine = AsyncLLM(config, Executor, log_stats=False, log_requests=False)
    app = build_app(args, ("generate",), config.model_config)
    await init_app_state(engine, app.state, args, ("generate",))
    started["engine"] = engine
    started["server"] = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", lifespan="off"))
    await started["server"].serve()
