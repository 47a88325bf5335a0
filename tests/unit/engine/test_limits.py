"""What keeps one request from exhausting the server, as far as it needs no vLLM."""

from __future__ import annotations

from typing import Any

import pytest

from vllm_d2cache.options.server import DEFAULT_CANVAS_LENGTH
from vllm_d2cache.options.types import OptionError
from vllm_d2cache.requests.resolve import parse_request_options, parse_server_options


def test_the_longest_canvas() -> None:
    options = parse_server_options({"max_canvas": 300})
    options.check_canvas_length(300)
    with pytest.raises(OptionError, match="max_tokens: this server allows canvases of 1 to 300 positions, got 301"):
        options.check_canvas_length(301)
    parse_server_options(None).check_canvas_length(10**6)


@pytest.mark.parametrize("value", [0, DEFAULT_CANVAS_LENGTH - 1, 300.5, "300", True])
def test_bad_max_canvas(value: Any) -> None:
    with pytest.raises(OptionError, match=r"max_canvas.*integer >= 256 .*default canvas must fit"):
        parse_server_options({"max_canvas": value})


def test_a_request_cannot_set_it() -> None:
    with pytest.raises(OptionError, match="server-wide only"):
        parse_request_options({"d2cache_max_canvas": 4096})
