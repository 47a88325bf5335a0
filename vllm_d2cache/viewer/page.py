"""One self-contained HTML page of a recorded request. The page loads nothing: style, script and data are inside."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterable, Mapping
from importlib.resources import files
from typing import Any

from vllm_d2cache.observe.trace_reader import RecordedRequest


def render_page(request: RecordedRequest, texts: Mapping[int, str]) -> str:
    """The page.

    Args:
        texts: token id -> text; tokens that are not in it are shown by their ids.
    """
    parts = files("vllm_d2cache.viewer")
    page = (parts / "page.html").read_text(encoding="utf-8")
    inserted = {
        "TITLE": html.escape(request.request_id),
        "STYLE": (parts / "page.css").read_text(encoding="utf-8"),
        "SCRIPT": (parts / "page.js").read_text(encoding="utf-8"),
        "DATA": _embeddable(_data(request, texts)),
    }
    # In one pass: what is inserted is never looked at again.
    return re.sub(r"\{\{([A-Z]+)\}\}", lambda match: inserted[match[1]], page)


def _data(request: RecordedRequest, texts: Mapping[int, str]) -> dict[str, Any]:
    """What page.js reads; short names, as there may be millions of numbers."""
    return {
        "id": request.request_id,
        "model": request.model,
        "prompt": request.prompt,
        "canvas": request.canvas_len,
        "options": request.options,
        "refreshed": [None if s.refreshed is None else ranges(s.refreshed) for s in request.steps],
        "commits": [[[c.slot, c.token, c.confidence] for c in s.commits] for s in request.steps],
        "revoked": [s.revoked for s in request.steps],
        "edited": [[[c.slot, c.token] for c in s.edited] for s in request.steps],
        "given": list(request.given.items()),
        "rows": request.step_rows,
        "seconds": request.step_seconds,
        "output": request.output,
        "finish": request.finish_reason,
        "texts": {str(token): text for token, text in texts.items()},
    }


def ranges(positions: Iterable[int]) -> list[int]:
    """Ascending positions as a flat list of start, length, start, length, ..."""
    out: list[int] = []
    for position in positions:
        if out and position == out[-2] + out[-1]:
            out[-1] += 1
        else:
            out += [position, 1]
    return out


def _embeddable(data: dict[str, Any]) -> str:
    """JSON that cannot end the script element it stands in, whatever text the tokens have."""
    return json.dumps(data, separators=(",", ":")).replace("<", "\\u003c").replace(">", "\\u003e")
