"""Read what the trace recorder wrote (server option `trace_dir`): one JSON-lines file a request.

    trace = find(directory, response.id)
    trace.steps, trace.rows, trace.full_rows

Standard library only.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Trace:
    """One request.

    Attributes:
        request_id: the engine's id; it begins with the id of the response.
        prompt_len: P, tokens of the prompt.
        canvas_len: G, tokens of the canvas.
        options: everything that decided how the request was decoded.
        refreshed: positions recomputed in each step; None for a step that recomputed all of them.
        committed: [slot, token] pairs committed in each step.
        output: the tokens of the response; None while the request runs, or if it was aborted.
        finish_reason: why it ended; None as above.
    """

    request_id: str
    prompt_len: int
    canvas_len: int
    options: dict[str, Any]
    refreshed: list[list[int] | None]
    committed: list[list[tuple[int, int]]]
    output: list[int] | None
    finish_reason: str | None

    @property
    def steps(self) -> int:
        """Forward passes of the request."""
        return len(self.refreshed)

    @property
    def step_rows(self) -> list[int]:
        """Rows recomputed in each step."""
        positions = self.prompt_len + self.canvas_len
        return [positions if rows is None else len(rows) for rows in self.refreshed]

    @property
    def rows(self) -> int:
        """Rows recomputed in all steps together."""
        return sum(self.step_rows)

    @property
    def full_rows(self) -> int:
        """Rows that the same steps would have recomputed without a cache."""
        return self.steps * (self.prompt_len + self.canvas_len)


def read(path: Path) -> Trace:
    """Read one file. A last line that is still being written is left out."""
    records = []
    for line in path.read_text().split("\n")[:-1]:
        records.append(json.loads(line))
    first, rest = records[0], records[1:]
    steps = [record for record in rest if "step" in record]
    last = rest[-1] if rest and "output_token_ids" in rest[-1] else {}
    return Trace(
        first["request_id"],
        len(first["prompt_token_ids"]),
        first["canvas_length"],
        first["options"],
        [record["refreshed"] for record in steps],
        [[(slot, token) for slot, token in record["committed"]] for record in steps],
        last.get("output_token_ids"),
        last.get("finish_reason"),
    )


def find(directory: Path, response_id: str, timeout: float = 5.0) -> Trace:
    """The trace of a response by its id (of its first choice, if it has several).

    The engine puts a random suffix behind the id, and a completion's choice index before the suffix. A worker may
    write the last line after the client has the response, hence the wait.

    Raises:
        FileNotFoundError: no trace of this response.
    """
    deadline = time.monotonic() + timeout
    while True:
        paths = sorted(directory.glob(f"{response_id}*.jsonl")) or sorted(directory.glob(f"*_{response_id}*.jsonl"))
        trace = read(paths[0]) if paths and paths[0].stat().st_size else None
        if trace and trace.finish_reason:
            return trace
        if time.monotonic() > deadline:
            if trace:
                return trace
            raise FileNotFoundError(f"no trace of {response_id} in {directory}")
        time.sleep(0.02)
