"""Text that is no text on every route: half a character in a field, a prompt that ends within one."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from tests.vllm.front_end_server import FrontEnd, front_end
from tests.vllm.routes import ROUTES, send

pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def server() -> Iterator[FrontEnd]:
    """A server without flags."""
    with pytest.MonkeyPatch.context() as patch, front_end(patch) as running:
        yield running


@pytest.mark.parametrize("left", [1, 2, 3])
@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_that_ends_within_a_character_does_not_come_back(server: FrontEnd, left: int, stream: bool) -> None:
    """Token ids may be cut anywhere; a text may end in the sign for a broken character itself."""
    ids = server.post("/tokenize", {"prompt": "ab\U0001f336"}).json()["tokens"]
    expected = send(server, "completions", prompt="ab").json()["choices"][0]["text"]
    assert expected
    for prompt in (ids[:-left], "ab" + "\ufffd" * left):
        response = send(server, "completions", prompt=prompt, stream=stream)
        chunks = [response.json()] if not stream else [
            json.loads(line[6:]) for line in response.text.splitlines() if line.startswith("data: {")
        ]  # fmt: skip
        assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == expected


HALF = "\\ud83d"
PLACES = {
    "completions": ["prompt", "stop", "request_id", "session_id", "user", "suffix"],
    "chat": ["stop", "request_id", "session_id", "user"],
    "responses": ["input", "stop", "request_id", "session_id", "instructions"],
    "messages": ["system"],
    "batch": ["stop", "request_id"],
}


def with_raw(route: str, field: str, raw: str) -> bytes:
    """A request with JSON text as it is for one field."""
    _, base, name = ROUTES[route]
    body = {**base, name: 8, field: "@@"}
    return json.dumps(body).replace('"@@"', raw).encode()


@pytest.mark.parametrize(("route", "field"), [(route, field) for route, fields in PLACES.items() for field in fields])
def test_half_a_character_is_no_text(server: FrontEnd, route: str, field: str) -> None:
    for raw in (f'"{HALF}"', f'"a{HALF}b"', f'"{HALF}\\ud83d\\ude00"'):
        before = len(server.core.requests)
        response = server.post(ROUTES[route][0], with_raw(route, field, raw))
        assert response.status_code == 400, response.text
        assert field in response.json()["error"]["message"]
        assert len(server.core.requests) == before
    assert "Traceback" not in server.log


@pytest.mark.parametrize(
    ("route", "field", "raw"),
    [
        ("completions", "bad_words", f'["{HALF}"]'),
        ("completions", "stop", f'["a", "{HALF}"]'),
        ("chat", "messages", f'[{{"role": "user", "content": "{HALF}"}}]'),
        ("chat", "vllm_xargs", f'{{"{HALF}": 1}}'),
        ("chat", "structured_outputs", f'{{"choice": ["{HALF}"]}}'),
        ("messages", "stop_sequences", f'["{HALF}"]'),
        ("messages", "messages", f'[{{"role": "user", "content": "{HALF}"}}]'),
        ("responses", "metadata", f'{{"a": "{HALF}"}}'),
    ],
)
def test_half_a_character_deep_in_a_field(server: FrontEnd, route: str, field: str, raw: str) -> None:
    response = server.post(ROUTES[route][0], with_raw(route, field, raw))
    assert response.status_code == 400, response.text
    assert field in response.json()["error"]["message"]


def test_whole_characters_in_two_escapes_are_text(server: FrontEnd) -> None:
    response = server.post("/v1/chat/completions", with_raw("chat", "stop", '"\\ud83d\\ude00"'))
    assert response.status_code == 200
    assert server.core.requests[-1].sampling_params.stop == ["\U0001f600"]
    field = server.post("/v1/chat/completions", with_raw("chat", "user", '"x"').replace(b'"user"', b'"\\ud83dx"'))
    assert field.status_code == 400
    assert "\\ud83dx" in field.json()["error"]["message"]


# --- fields that would be dropped -----------------------------------------------------------------------------------
