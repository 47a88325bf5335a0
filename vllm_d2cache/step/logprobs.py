"""Log-probabilities of committed tokens: taken in the step that commits a token, handed out with that token.

A token committed behind a gap is emitted steps later; until then its log-probabilities wait here. Memory is taken
only for running requests that ask, and only as wide as the widest of their canvases.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from vllm_d2cache.canvas.request import Request
from vllm_d2cache.canvas.rows import StepResult, StepRows
from vllm_d2cache.canvas.states import CanvasStates
from vllm_d2cache.ops.top_logprobs import top_logprobs


class EmittedLogprobs(NamedTuple):
    """Log-probabilities of the tokens emitted in a step; E of them belong to requests that ask.

    k is the largest number of alternatives that a running request asks for; columns past a request's own are not
    its own.
    """

    token_ids: torch.Tensor  # [E, k + 1] int64, the emitted token first
    logprobs: torch.Tensor  # [E, k + 1] float32
    ranks: torch.Tensor  # [E] int64, of the emitted token
    starts: list[int]  # [R + 1], where each row of the batch begins


class LogprobRecorder:
    """Keeps what was found at the commit of each canvas slot, for requests that ask for log-probabilities.

    Tables have a line for each such request: [lines, G, k + 1] with G and k the largest asked for.

    Args:
        canvas: of the running requests; read, never written.
    """

    def __init__(self, canvas: CanvasStates) -> None:
        self.canvas = canvas
        self._lines: dict[int, int] = {}  # slot -> line
        self._clear()

    def _clear(self) -> None:
        device = self.canvas.device
        self._ids = torch.empty(0, 0, 1, dtype=torch.int64, device=device)
        self._logprobs = torch.empty(0, 0, 1, device=device)
        self._ranks = torch.empty(0, 0, dtype=torch.int64, device=device)

    def add(self, slot: int, request: Request) -> None:
        """Give the request of ``slot`` a line, if it asks. Its canvas must be there already."""
        count = request.sampling.num_logprobs
        if count is None:
            return
        line = min(set(range(len(self._lines) + 1)) - set(self._lines.values()))
        self._lines[slot] = line
        self._grow(line + 1, request.canvas_len, count + 1)
        # A slot that is never committed was given by the request: certain, and without alternatives.
        given = self.canvas.tokens[slot, request.prompt_len : request.prompt_len + request.canvas_len]
        self._ids[line, : request.canvas_len] = given.unsqueeze(1).long()
        self._logprobs[line] = 0.0
        self._ranks[line] = 1

    def any_of(self, slots: Sequence[int]) -> bool:
        """Whether some request of these slots asks for log-probabilities."""
        return not self._lines.keys().isdisjoint(slots)

    def remove(self, slot: int) -> None:
        """Free the line of ``slot``, and the tables with the last one."""
        self._lines.pop(slot, None)
        if not self._lines:
            self._clear()

    def record(
        self, rows: StepRows, result: StepResult, hidden: torch.Tensor, lm_head: Callable[[torch.Tensor], torch.Tensor]
    ) -> EmittedLogprobs | None:
        """Note what this step committed; returns what goes with the tokens it emits, None if no row asks.

        Args:
            result: of the step, after StepRunner.close.
            hidden: [n, d] final hidden states of the predicted slots, in the order of ``rows.logits_rows``.
            lm_head: maps [m, d] to [m, vocab] logits.
        """
        lines_host = [self._lines.get(slot, -1) for slot in rows.slots]
        if max(lines_host) < 0:
            return None
        lines = torch.tensor(lines_host, device=self.canvas.device)
        self._take(rows, result, lines, hidden, lm_head)
        return self._emit(rows, result, lines, lines_host)

    def _take(
        self,
        rows: StepRows,
        result: StepResult,
        lines: torch.Tensor,
        hidden: torch.Tensor,
        lm_head: Callable[[torch.Tensor], torch.Tensor],
    ) -> None:
        """Run the head once more on the slots that were committed: few, where the predicted ones are many."""
        who, slot = rows.predicted_index
        chosen = (result.committed[who, slot] & (lines[who] >= 0)).nonzero().flatten()
        who, slot = who[chosen], slot[chosen]
        view = rows.view
        token = self.canvas.tokens[view.slots[who], view.prompt_len[who] + slot].long()
        width = self._ids.shape[2]
        ids, logprobs, ranks = top_logprobs(hidden[chosen], lm_head, token, width - 1)
        self._ids[lines[who], slot] = ids
        self._logprobs[lines[who], slot] = logprobs
        self._ranks[lines[who], slot] = ranks

    def _emit(self, rows: StepRows, result: StepResult, lines: torch.Tensor, lines_host: list[int]) -> EmittedLogprobs:
        emitted = result.num_tokens.tolist()
        counts_host = [n if line >= 0 else 0 for n, line in zip(emitted, lines_host, strict=True)]
        starts = [0]
        for count in counts_host:
            starts.append(starts[-1] + count)
        counts = torch.tensor(counts_host, device=lines.device)
        before = self.canvas.emitted[rows.view.slots] - result.num_tokens
        row = torch.arange(len(counts_host), device=lines.device).repeat_interleave(counts)
        within = torch.arange(starts[-1], device=lines.device) - (counts.cumsum(0) - counts)[row]
        line, slot = lines[row], before[row] + within
        return EmittedLogprobs(self._ids[line, slot], self._logprobs[line, slot], self._ranks[line, slot], starts)

    def _grow(self, lines: int, width: int, columns: int) -> None:
        """Make room for this many lines, slots and columns; what stands there stays."""
        more = [max(0, want - have) for want, have in zip((lines, width, columns), self._ids.shape, strict=True)]
        if any(more):
            pad = (0, more[2], 0, more[1], 0, more[0])
            self._ids = torch.nn.functional.pad(self._ids, pad)
            self._logprobs = torch.nn.functional.pad(self._logprobs, pad)
            self._ranks = torch.nn.functional.pad(self._ranks, pad[2:])
