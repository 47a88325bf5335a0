"""Reads the trace of one request (docs/tracing.md). Standard library only."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


class TraceError(ValueError):
    """The file is not a trace. The message names the line and what is wrong with it."""


@dataclass(frozen=True)
class Commit:
    """A mask that became a token."""

    slot: int  # in the canvas
    token: int
    confidence: float | None  # probability of the token; None in files that do not have it


@dataclass(frozen=True)
class Step:
    """One forward pass."""

    refreshed: list[int] | None  # ascending positions; None = all
    commits: list[Commit]
    revoked: list[int]  # slots committed earlier and masked again; of decoders that verify
    edited: list[Commit]  # slots committed earlier that hold another token now; of decoders that edit
    elapsed: float | None  # seconds from the first line; None in files that do not have it


@dataclass(frozen=True)
class RecordedRequest:
    """One request.

    Attributes:
        request_id: the engine's id.
        model: what vLLM calls the model; None in files that do not say.
        prompt: [P] token ids.
        canvas_len: G.
        given: slot -> token that the request itself put into its canvas; empty if the canvas was all masks.
        options: everything that decided how the request was decoded, by plain name.
        steps: in order; may be cut short if the request was aborted or still runs.
        output: the tokens of the response; None if the file has no last line.
        finish_reason: ``stop``, ``length`` or ``abort``; None as above.
    """

    request_id: str
    model: str | None
    prompt: list[int]
    canvas_len: int
    given: dict[int, int]
    options: dict[str, Any]
    steps: list[Step]
    output: list[int] | None
    finish_reason: str | None

    @property
    def num_positions(self) -> int:
        """T."""
        return len(self.prompt) + self.canvas_len

    def canvas_after(self, done: int) -> dict[int, tuple[int, Commit]]:
        """Slot -> (step, commit) of the slots that hold a token after ``done`` steps; step -1 for given ones."""
        state = {slot: (-1, Commit(slot, token, None)) for slot, token in self.given.items()}
        for number, step in enumerate(self.steps[:done]):
            for slot in step.revoked:
                state.pop(slot, None)
            state |= {commit.slot: (number, commit) for commit in (*step.commits, *step.edited)}
        return state

    @property
    def step_rows(self) -> list[int]:
        """Rows recomputed in each step."""
        return [self.num_positions if s.refreshed is None else len(s.refreshed) for s in self.steps]

    @property
    def step_seconds(self) -> list[float] | None:
        """What each step took; None if the file has no times."""
        ends = [s.elapsed for s in self.steps]
        if not ends or None in ends:
            return None
        times = [end for end in ends if end is not None]
        return [end - start for start, end in zip([0.0, *times], times, strict=False)]


def read_trace(path: Path) -> RecordedRequest:
    """The request recorded in a file. A last line that is still being written is left out.

    Raises:
        OSError: the file cannot be read.
        TraceError: it is not a trace.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    except UnicodeDecodeError as error:
        raise TraceError(f"{path}: not a trace: {error}") from error
    if not lines:
        raise TraceError(f"{path}: not a trace: no complete line")
    head: dict[str, Any] = {}
    steps: list[Step] = []
    last: dict[str, Any] = {}
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            if number == 1:
                head = _head(record)
            elif "output_token_ids" in record:
                last = record
            else:
                steps.append(_step(record, head["canvas_len"], len(head["prompt"]) + head["canvas_len"]))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            what = f"no field {error}" if isinstance(error, KeyError) else str(error)
            raise TraceError(f"{path}: not a trace: line {number}: {what}") from error
    return RecordedRequest(
        **head, steps=steps, output=last.get("output_token_ids"), finish_reason=last.get("finish_reason")
    )


def _head(record: dict[str, Any]) -> dict[str, Any]:
    canvas = record.get("canvas") or []  # a token for each slot, -1 = a hole
    if len(canvas) not in (0, record["canvas_length"]):
        raise ValueError(f"canvas: {len(canvas)} slots instead of {record['canvas_length']}")
    return {
        "request_id": str(record["request_id"]),
        "model": record.get("model"),
        "prompt": [int(token) for token in record["prompt_token_ids"]],
        "canvas_len": int(record["canvas_length"]),
        "given": {slot: int(token) for slot, token in enumerate(canvas) if token >= 0},
        "options": dict(record["options"]),
    }


def _step(record: dict[str, Any], canvas_len: int, num_positions: int) -> Step:
    committed = record["committed"]
    confidence = record.get("confidence") or [None] * len(committed)
    commits = [Commit(int(s), int(t), c) for (s, t), c in zip(committed, confidence, strict=True)]
    refreshed = record["refreshed"]
    revoked = [int(slot) for slot in record.get("revoked") or []]
    edited = [Commit(int(slot), int(token), None) for slot, token in record.get("edited") or []]
    named = (("committed", [c.slot for c in commits]), ("revoked", revoked), ("edited", [c.slot for c in edited]))
    for name, slots in named:
        if any(not 0 <= slot < canvas_len for slot in slots):
            raise ValueError(f"{name}: a slot is not in 0..{canvas_len - 1}")
    if refreshed is not None and any(not 0 <= p < num_positions for p in refreshed):
        raise ValueError(f"refreshed: a position is not in 0..{num_positions - 1}")
    return Step(refreshed, commits, revoked, edited, record.get("elapsed"))
