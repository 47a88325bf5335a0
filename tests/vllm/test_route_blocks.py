"""Routes of a model whose texts grow block by block: max_tokens says when to stop, and the default is what is left."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.reference.blocks import BLOCK_ORACLE
from tests.vllm.front_end_server import TINY, FrontEnd, front_end
from tests.vllm.routes import ROUTES, answered, cap_flags, refused, send

pytestmark = pytest.mark.vllm

LENGTH = 1024
DEFAULTED = [route for route in ROUTES if route != "messages"]  # where max_tokens is required


def serving(patch: pytest.MonkeyPatch, *flags: str) -> FrontEnd:
    """Random weights of SDAR's shape, with the words of another tokenizer."""
    return front_end(patch, str(BLOCK_ORACLE / "sdar"), "--tokenizer", TINY, *flags)


def left(server: FrontEnd, route: str) -> int:
    """Positions behind the prompt of the request that came last."""
    return LENGTH - len(server.core.requests[-1].prompt_token_ids)


def test_the_default_is_the_rest_of_the_context() -> None:
    with pytest.MonkeyPatch.context() as patch, serving(patch) as server:
        for route in DEFAULTED:
            assert answered(server, route, length=None).sampling_params.max_tokens == left(server, route) > 900
            assert answered(server, route, length=None, **{ROUTES[route][2]: None}).sampling_params.max_tokens > 900
            refused(server, route, length=LENGTH)  # what is asked for is not cut
        for length in (1, 3, 1000):
            prompt = {"prompt": [7] * (LENGTH - length)}
            assert answered(server, "completions", length=None, **prompt).sampling_params.max_tokens == length
        refused(server, "completions", "the prompt leaves no room", length=None, prompt=[7] * LENGTH)
        assert send(server, "completions", length=0, echo=True).json()["choices"][0]["text"] == "a"


@pytest.mark.parametrize("named", ["override", "directory"])
def test_the_operators_cap(named: str, tmp_path: Path) -> None:
    flags = cap_flags(named, tmp_path)
    with pytest.MonkeyPatch.context() as patch, serving(patch, *flags) as server:
        for route in DEFAULTED:
            assert answered(server, route, length=None).sampling_params.max_tokens == 24
            refused(server, route, f"{ROUTES[route][2]}: a canvas of 25 positions is longer", length=25)
        short = answered(server, "completions", length=None, prompt=[7] * (LENGTH - 9))
        assert short.sampling_params.max_tokens == 9


def test_the_default_keeps_to_the_longest_that_the_server_allows() -> None:
    flags = ("--additional-config", '{"d2cache": {"max_canvas": 300}}')
    with pytest.MonkeyPatch.context() as patch, serving(patch, *flags) as server:
        for route in DEFAULTED:
            assert answered(server, route, length=None).sampling_params.max_tokens == 300
        refused(server, "completions", "max_tokens: this server allows canvases of 1 to 300", length=301)
        short = answered(server, "completions", length=None, prompt=[7] * (LENGTH - 9))
        assert short.sampling_params.max_tokens == 9
