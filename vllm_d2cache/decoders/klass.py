"""KLASS: tokens whose distribution has settled come together (Kim et al., 2025; docs/methods/d2cache.md, section 4)."""

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
from vllm_d2cache.mechanisms.base import RequestSize, Worker
from vllm_d2cache.ops.ranking import allowed_count
from vllm_d2cache.ops.row_stats import TileReader, scaled_logits
from vllm_d2cache.options.types import Number

# More steps than any request takes, with room to count on in int32.
_MANY_STEPS = 1 << 30


class KlassDecoder(Decoder):
    """Commits what the threshold or the factor rule takes of the stable candidates; if nothing, the best of all.

    A candidate is stable when the divergence KL(p_t | p_t-1) of its distribution stayed below ``kl_threshold`` in its
    last ``kl_history_length`` steps. Keeping p_t-1 would take canvas x vocabulary numbers a request. Its final hidden
    state is kept instead, canvas x width, and goes through the LM head once more: the same distribution.
    """

    name = "klass"
    options: ClassVar = {
        "kl_threshold": Number(float, 0, open_low=True, note="nats", default=0.01),
        "kl_history_length": Number(int, 1, note="steps", default=2),
    }
    reads = ("threshold", "factor", "score")
    commits_many = True
    default_threshold = 0.9
    observes_all = True

    def __init__(self, worker: Worker) -> None:
        super().__init__(worker)
        num_slots, max_len, device = worker.num_slots, worker.max_len, worker.device
        # By canvas slot: for how many steps in a row its divergence has been below the threshold.
        self.calm = torch.zeros(num_slots, max_len, dtype=torch.int32, device=device)
        self._pool = CanvasPool(num_slots, device)
        self._hidden: torch.Tensor | None = None  # [lines, d], of a canvas slot's last computed row
        self._seen = torch.zeros(0, dtype=torch.bool, device=device)  # [lines], whether there has been such a row

    @classmethod
    def request_bytes(cls, size: RequestSize) -> int:
        """A hidden state for each canvas slot, and a copy while the memory of all grows."""
        return 2 * size.canvas_len * size.row_bytes

    def start(self, slot: int, request: Request) -> None:
        """The history begins with zeros, and with a distribution that is zero everywhere."""
        super().start(slot, request)
        self.calm[slot] = min(request.options.value("kl_history_length"), _MANY_STEPS)
        lines = self._pool.take(slot, request.canvas_len)
        self._seen = self._pool.fit(self._seen)
        self._seen[lines] = False

    def stop(self, slot: int) -> None:
        """Make room."""
        self._pool.give_back(slot)

    def tile_reader(self, rows: PredictedRows) -> TileReader:
        """Compare each row's distribution with that of the slot's last computed row."""
        hidden = rows.hidden
        if self._hidden is None:
            self._hidden = hidden.new_zeros(0, hidden.shape[1])
        self._hidden = memory = self._pool.fit(self._hidden)
        line = self._pool.lines(rows.slots, rows.canvas_slot)
        limit = self.number("kl_threshold", rows.slots)

        def read(i: int, j: int, logits: torch.Tensor) -> None:
            local = rows.mine[i:j].nonzero().flatten()
            if not len(local):
                return
            mine = local + i
            at = line[mine]
            last = scaled_logits(rows.lm_head(memory[at]), rows.params.rows(mine), rows.mask_token_id)
            before = torch.where(self._seen[at].unsqueeze(1), torch.softmax(last, dim=-1), 0.0)
            divergence = _divergence(torch.softmax(logits[local], dim=-1), before)
            where = rows.slots[mine], rows.canvas_slot[mine]
            self.calm[where] = torch.where(divergence < limit[mine], self.calm[where] + 1, 0)
            memory[at] = hidden[mine]
            self._seen[at] = True

        return read

    def choose(self, step: DecoderStep) -> Commits:
        """Stable candidates by the request's rule, else the best ``least`` of all."""
        view = step.view
        length = self.number("kl_history_length", view.slots)
        calm = self.calm[view.slots, : step.candidates.shape[1]]
        stable = step.candidates & (calm >= length.unsqueeze(1))
        ordered, index, valid = rank_candidates(step.score, stable)
        none = torch.zeros_like(step.least)
        settled = take_best(index, stable, allowed_count(ordered, valid, none, *view.rules))
        _, index, _ = rank_candidates(step.score, step.candidates)
        best = take_best(index, step.candidates, step.least)
        return Commits(torch.where(settled.any(1, keepdim=True), settled, best))


def _divergence(now: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    """[m] float32: KL(now | before) in nats of [m, vocab] probabilities, finite where ``before`` is zero."""
    return (now * ((now + 1e-12).log() - (before + 1e-12).log())).sum(-1)
