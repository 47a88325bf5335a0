"""The routes of a server, the least that each wants to be asked, and what is asked of its answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.vllm.front_end_server import TINY, FrontEnd

ASK = [{"role": "user", "content": "Reverse: abcd"}]
# Route -> path, the least that a request must have, and the field of its canvas length.
ROUTES: dict[str, tuple[str, dict[str, Any], str]] = {
    "completions": ("/v1/completions", {"prompt": "a"}, "max_tokens"),
    "chat": ("/v1/chat/completions", {"messages": ASK}, "max_tokens"),
    "responses": ("/v1/responses", {"input": "a"}, "max_output_tokens"),
    "messages": ("/v1/messages", {"model": TINY, "messages": ASK}, "max_tokens"),
    "batch": ("/v1/chat/completions/batch", {"messages": [ASK]}, "max_tokens"),
}
STREAMING = ("completions", "chat", "responses", "messages")


def send(server: FrontEnd, route: str, length: int | None = 8, **fields: Any) -> Any:
    """The response to a request that has everything it needs besides ``fields``."""
    path, base, name = ROUTES[route]
    given = {} if length is None else {name: length}
    return server.post(path, {**base, **given, **fields})


def refused(server: FrontEnd, route: str, *names: str, **fields: Any) -> str:
    """The message of a refusal: HTTP 400, naming these, and nothing has reached the engine or the log."""
    before, length = len(server.core.requests), len(server.log)
    response = send(server, route, **fields)
    assert response.status_code == 400, (response.status_code, response.text[:500])
    assert response.headers["content-type"].startswith("application/json")
    message = str(response.json()["error"]["message"])
    assert all(name in message for name in names), message
    assert len(server.core.requests) == before
    assert "Traceback" not in server.log[length:]
    return message


def answered(server: FrontEnd, route: str, **fields: Any) -> Any:
    """The request as the engine got it."""
    response = send(server, route, **fields)
    assert response.status_code == 200, response.text[:500]
    assert '"error"' not in response.text
    return server.core.requests[-1]


def cap_flags(named: str, directory: Path) -> tuple[str, str]:
    """Flags of an operator who lets no request have more than 24 tokens: in an "override", or in a "directory"."""
    (directory / "generation_config.json").write_text(json.dumps({"max_new_tokens": 24}))
    if named == "override":
        return "--override-generation-config", json.dumps({"max_new_tokens": 24})
    return "--generation-config", str(directory)
