"""Credit decoding: tokens that stayed on top for several steps are trusted sooner.

docs/methods/other-caches.md, section 6.3.
"""

from __future__ import annotations

from typing import ClassVar

import torch

from vllm_d2cache.canvas.request import Request
from vllm_d2cache.decoders.base import (
    Commits,
    Decoder,
    DecoderStep,
    PredictedRows,
    rank_candidates,
    take_best,
)
from vllm_d2cache.decoders.pool import CanvasPool
from vllm_d2cache.mechanisms.base import Worker
from vllm_d2cache.ops.row_stats import TileReader
from vllm_d2cache.options.types import Number

# How far below the best candidate another may lie and still count as equal to it (docs/methods/other-caches.md, section
# 6.2).
_TIE = 1e-5
_MORE_COLUMNS = 4


class CreditDecoder(Decoder):
    """Adds credit to the logits of tokens that ranked first before, then commits all candidates over a threshold.

    In each step a slot's credits fade by ``credit_beta`` and its most probable token, of probability p, gains
    p ^ ``credit_gamma``; a token with credit C has its logit raised by ``credit_alpha`` ln(1 + C). Only tokens that
    have been a slot's most probable one have credit: a short list a slot, not a number for each of the vocabulary.
    """

    name = "credit"
    options: ClassVar = {
        "credit_alpha": Number(float, 0, default=0.7),
        "credit_beta": Number(float, 0, 1, default=0.8),
        "credit_gamma": Number(float, 0, default=0.2),
    }
    reads = ("threshold", "score")
    commits_many = True
    default_threshold = 0.9

    def __init__(self, worker: Worker) -> None:
        super().__init__(worker)
        device = worker.device
        self._pool = CanvasPool(worker.num_slots, device)
        # Line of a canvas slot -> its tokens with credit, -1 behind them, and the credits.
        self._tokens = torch.zeros(0, _MORE_COLUMNS, dtype=torch.int64, device=device)
        self._credit = torch.zeros(0, _MORE_COLUMNS, device=device)

    def start(self, slot: int, request: Request) -> None:
        """No token has credit."""
        super().start(slot, request)
        lines = self._pool.take(slot, request.canvas_len)
        self._tokens, self._credit = self._pool.fit(self._tokens), self._pool.fit(self._credit)
        self._tokens[lines], self._credit[lines] = -1, 0.0

    def stop(self, slot: int) -> None:
        """Make room."""
        self._pool.give_back(slot)

    def tile_reader(self, rows: PredictedRows) -> TileReader:
        """Give credit to the most probable tokens of the window's slots, and raise logits by what has been gathered."""
        line = self._pool.lines(rows.slots, rows.canvas_slot)
        mine = rows.mine & rows.in_window
        alpha, beta, gamma = (self.number(name, rows.slots) for name in self.options)

        def read(i: int, j: int, logits: torch.Tensor) -> None:
            local = mine[i:j].nonzero().flatten()
            if not len(local):
                return
            row = local + i
            part = logits[local]
            probs = torch.softmax(part, dim=-1)
            mask = torch.tensor([rows.mask_token_id], device=part.device)
            token = part.index_fill(1, mask, -torch.inf).argmax(1, keepdim=True)
            gain = probs.gather(1, token).squeeze(1) ** gamma[row]
            tokens, credit = self._give(line[row], token, gain, beta[row])
            bonus = alpha[row].unsqueeze(1) * credit.log1p()  # 0 where there is no token
            logits[local] = part.scatter_add(1, tokens.clamp(min=0), bonus)

        return read

    def _give(
        self, line: torch.Tensor, token: torch.Tensor, gain: torch.Tensor, beta: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Fade the credits of the lines [m], add ``gain`` [m] to that of ``token`` [m, 1]; returns both lists."""
        tokens, credit = self._tokens[line], self._credit[line] * beta.unsqueeze(1)
        here, free = tokens == token, tokens < 0
        if not bool((here | free).any(1).all()):
            self._tokens = torch.nn.functional.pad(self._tokens, (0, _MORE_COLUMNS), value=-1)
            self._credit = torch.nn.functional.pad(self._credit, (0, _MORE_COLUMNS))
            return self._give(line, token, gain, beta)
        # The token's own column, else the first free one.
        column = (2 * here.to(torch.int8) + free.to(torch.int8)).argmax(1, keepdim=True)
        tokens = tokens.scatter(1, column, token)
        credit = credit.scatter_add(1, column, gain.unsqueeze(1))
        self._tokens[line], self._credit[line] = tokens, credit
        return tokens, credit

    def choose(self, step: DecoderStep) -> Commits:
        """All that reach the threshold; if none does, the best and what equals it."""
        score = step.score.masked_fill(~step.candidates, -torch.inf)
        limit = torch.minimum(step.view.options.threshold, score.amax(1) - _TIE).unsqueeze(1)
        _, index, _ = rank_candidates(step.score, step.candidates)
        return Commits((step.candidates & (score >= limit)) | take_best(index, step.candidates, step.least))
