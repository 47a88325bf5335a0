"""Writes one JSON-lines file a request: what was refreshed and committed in every step. Off by default."""

from __future__ import annotations

import hashlib
import json
import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import torch

from vllm_d2cache.canvas.request import Request
from vllm_d2cache.canvas.rows import StepResult, StepRows
from vllm_d2cache.canvas.states import CanvasStates

_LONGEST_NAME = 200


class TraceRecorder:
    """Records the requests of one worker (docs/tracing.md has the format).

    Args:
        directory: made if it does not exist.
        model: what the first line calls the model, so that a viewer can find its tokenizer.
    """

    def __init__(self, directory: str, model: str) -> None:
        self.directory = Path(directory)
        self.model = model
        # A prompt's token ids are its text: for the server's user alone.
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._files: dict[int, IO[str]] = {}
        self._output: dict[int, list[int]] = {}
        self._steps: dict[int, int] = {}
        self._started: dict[int, float] = {}

    def start(self, slot: int, request: Request, prompt: list[int]) -> None:
        """Begin a file; a request that starts over after a preemption begins it anew."""
        path = self.directory / f"{_file_name(request.req_id)}.jsonl"
        self._files[slot] = open(path, "w", encoding="utf-8", opener=_open_private)  # noqa: SIM115  # until finish
        self._output[slot] = []
        self._steps[slot] = 0
        self._started[slot] = time.monotonic()
        self._write(
            slot,
            {
                "request_id": request.req_id,
                "prompt_token_ids": prompt,
                "canvas_length": request.canvas_len,
                "options": asdict(request.options),
                "model": self.model,
                **({"canvas": list(request.given)} if request.given else {}),
            },
        )

    def step(self, rows: StepRows, result: StepResult, canvas: CanvasStates, confidence: torch.Tensor) -> None:
        """Add a line to each request of the step, and the last one where it is complete.

        Args:
            confidence: [n] float32 of the predicted slots, in the order of ``rows.predicted_index``.
        """
        offset = 0
        by_slot = rows.by_slot(confidence)
        now = time.monotonic()
        for r, slot in enumerate(rows.slots):
            count = rows.counts[r]
            positions = rows.positions[offset : offset + count]
            offset += count
            if slot not in self._files:
                continue
            request = canvas.requests[slot]
            committed = result.committed[r].nonzero().flatten().tolist()
            tokens = canvas.tokens[slot, request.prompt_len :]
            line = {
                "step": self._steps[slot],
                "refreshed": None if rows.full[r] else positions.tolist(),
                "committed": [[s, int(tokens[s])] for s in committed],
                "masked_left": int(result.masked[r].sum()),
                "confidence": [round(c, 6) for c in by_slot[r, committed].tolist()],
                "elapsed": round(now - self._started[slot], 6),
            }
            if rows.extra[r] and result.revoked is not None:
                line |= {"shadows": rows.extra[r], "revoked": result.revoked[r].nonzero().flatten().tolist()}
            if result.revised is not None and (edited := result.revised[r].nonzero().flatten().tolist()):
                line["edited"] = [[s, int(tokens[s])] for s in edited]
            self._write(slot, line)
            self._steps[slot] += 1
            if result.num_tokens[r] > 0:
                # From the canvas: after a preemption the first tokens are decoded again but not emitted again.
                self._extend(slot, request, tokens[: int(canvas.emitted[slot])].tolist())

    def _extend(self, slot: int, request: Request, tokens: list[int]) -> None:
        """Add what is new of all emitted tokens, up to the one that ends the request."""
        for token in tokens[len(self._output[slot]) :]:
            self._output[slot].append(token)
            if token in request.sampling.stop_token_ids:
                return self.finish(slot, "stop")
            if len(self._output[slot]) == (request.wanted or request.canvas_len):
                return self.finish(slot, "length")
        return None

    def finish(self, slot: int, reason: str) -> None:
        """Write the last line, if it has not been written yet."""
        if slot in self._files:
            self._write(slot, {"output_token_ids": self._output.pop(slot), "finish_reason": reason})
            self._files.pop(slot).close()

    def _write(self, slot: int, record: dict[str, Any]) -> None:
        self._files[slot].write(json.dumps(record) + "\n")
        self._files[slot].flush()


def _open_private(path: str, flags: int) -> int:
    """Open for the server's user alone, and nothing that a link in the directory leads to."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o600)


def _file_name(req_id: str) -> str:
    """``req_id`` with harmless characters alone, and short enough for any file system."""
    name = "".join(c if (c.isascii() and c.isalnum()) or c in "-_." else "_" for c in req_id)
    return name if len(name) <= _LONGEST_NAME else name[: _LONGEST_NAME - 17] + "-" + _digest(req_id)


def _digest(req_id: str) -> str:
    return hashlib.blake2b(req_id.encode(), digest_size=8).hexdigest()
