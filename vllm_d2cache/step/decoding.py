"""The decoders' part of a step: what they need of the network, and what they make of it.

Requests with different decoders share a step. What one of them needs is computed only where a request of the step has
chosen it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from vllm_d2cache.canvas.rows import StepRows
from vllm_d2cache.canvas.standing import Standing
from vllm_d2cache.canvas.states import CanvasStates
from vllm_d2cache.decoders.base import Commits, Decoder, DecoderStep, PredictedRows
from vllm_d2cache.decoders.registry import DECODER_CLASSES
from vllm_d2cache.decoders.schedule import least_commits
from vllm_d2cache.decoders.scores import ranking_score
from vllm_d2cache.mechanisms.base import Finding, Worker
from vllm_d2cache.ops.host import upload, upload_lists
from vllm_d2cache.ops.row_sampling import sampling_of_nobody, sampling_of_rows
from vllm_d2cache.ops.row_stats import RowParams, RowStats, row_stats, token_probability
from vllm_d2cache.ops.step_rows import spread
from vllm_d2cache.options.request import SCORES
from vllm_d2cache.step.constraints import Constraints

LMHead = Callable[[torch.Tensor], torch.Tensor]
"""[m, d] final hidden states -> [m, vocab] logits."""


class Part(NamedTuple):
    """One decoder's share of a step. Where it is the only one, the tensors are None: all is its own."""

    decoder: Decoder
    slots: list[int]  # of its requests
    chosen: torch.Tensor | None  # [m] int64, rows of the batch
    mine: torch.Tensor | None  # [n] bool, predicted slots that are of these


class Asks(NamedTuple):
    """What the decoders of a batch's requests ask for; no step changes it. [R] bool each, None = nobody does."""

    parts: list[Part]  # as if nothing were predicted
    takes_padding: bool  # whether there may be padding among the predicted slots
    observes: torch.Tensor | None  # reads the statistics of all masked slots that are computed
    revises: torch.Tensor | None  # may write over tokens of the current window
    provisional: torch.Tensor | None  # may take back tokens of the current window
    samples: bool
    filters: bool  # by top-p or top-k
    density: bool  # some score reads the probability's share of the vocabulary
    entropy: bool  # some score or decoder reads it
    tiles: bool  # some decoder may read tiles of logits


class Choice(NamedTuple):
    """What was predicted, by canvas slot; 0 where nothing was."""

    score: torch.Tensor  # [R, G] float32, the ranking statistic without prior
    token: torch.Tensor  # [R, G] int32
    entropy: torch.Tensor | None  # [R, G] float32, nats


class Decoding:
    """The decoders of all running requests.

    Args:
        canvas: of the requests; read only.
        constraints: what the requests ask to be done to their logits; read only.
    """

    def __init__(self, worker: Worker, canvas: CanvasStates, constraints: Constraints) -> None:
        self.worker = worker
        self.canvas = canvas
        self.constraints = constraints
        self._decoders: dict[type[Decoder], Decoder] = {}
        self._of_slot: dict[int, Decoder] = {}
        self._asked = Standing(self._asks)

    def decoder(self, cls: type[Decoder]) -> Decoder:
        """The decoder of that class; made when the first request asks for it."""
        if cls not in self._decoders:
            self._decoders[cls] = cls(self.worker)
        return self._decoders[cls]

    def start(self, slot: int) -> None:
        """The request in ``slot`` begins, or starts over."""
        request = self.canvas.requests[slot]
        cls = DECODER_CLASSES[request.options.decoder]
        decoder = self._of_slot[slot] = self.decoder(cls.ordered or cls if request.options.ordered else cls)
        decoder.start(slot, request)
        self._asked.forget()

    def stop(self, slot: int) -> None:
        """The request in ``slot`` has ended."""
        self._of_slot.pop(slot).stop(slot)
        self._asked.forget()

    def asks(self, slots: Sequence[int]) -> Asks:
        """What the decoders of these requests ask for."""
        return self._asked.of(slots)

    def _asks(self, slots: Sequence[int]) -> Asks:
        decoders = [self._of_slot[s] for s in slots]
        requests = [self.canvas.requests[s] for s in slots]
        scores = {r.options.score for r in requests}
        return Asks(
            self._shares(slots, decoders),
            all(d.takes_padding for d in decoders),
            self._flags([d.observes_all for d in decoders]),
            self._flags([d.revises for d in decoders]),
            self._flags([d.revokes or d.revises for d in decoders]),
            any(r.sampling.temperature > 0 for r in requests),
            any(
                r.options.confidence_top_p < 1
                or (r.sampling.temperature > 0 and (r.sampling.top_p < 1 or r.sampling.top_k > 0))
                for r in requests
            ),
            SCORES[1] in scores,
            SCORES[2] in scores or any(d.reads_entropy for d in decoders),
            any(type(d).tile_reader is not Decoder.tile_reader for d in decoders),
        )

    def _flags(self, flags: list[bool]) -> torch.Tensor | None:
        return upload(flags, torch.bool, self.canvas.device) if any(flags) else None

    def _shares(self, slots: Sequence[int], decoders: list[Decoder]) -> list[Part]:
        members: dict[Decoder, list[int]] = {}
        for i, decoder in enumerate(decoders):
            members.setdefault(decoder, []).append(i)
        if len(members) == 1:
            return [Part(decoders[0], list(slots), None, None)]
        uploaded = upload_lists(list(members.values()), torch.int64, self.canvas.device)
        return [
            Part(decoder, [slots[i] for i in mine], chosen, None)
            for (decoder, mine), chosen in zip(members.items(), uploaded, strict=True)
        ]

    def row_stats(
        self, rows: StepRows, parts: Sequence[Part], hidden: torch.Tensor, lm_head: LMHead, want_entropy: bool
    ) -> RowStats:
        """Statistics of the predicted slots: those that some request of the step reads.

        Args:
            parts: see ``parts``.
            hidden: [n, d] final hidden states, in the order of ``rows.predicted_index``.
            want_entropy: somebody else reads the entropy, whatever scores and decoders do.
        """
        view, (who, slot) = rows.view, rows.predicted_index
        params = self._row_params(rows, who, slot)
        asks = self.asks(rows.slots)
        mask = self.canvas.traits.mask_token_id
        readers = []
        for decoder, slots, chosen, mine in parts if asks.tiles else ():
            seen = PredictedRows(view, rows.predicted, who, slot, mine, chosen, hidden, lm_head, params, mask, slots)
            if (reader := decoder.tile_reader(seen)) is not None:
                readers.append(reader)
        wanted, vocab_size = (asks.density, want_entropy or asks.entropy), self.worker.vocab_size
        return row_stats(hidden, lm_head, params, mask, *wanted, readers, vocab_size)

    def probability(
        self,
        rows: StepRows,
        lm_head: LMHead,
        hidden: torch.Tensor,
        who: torch.Tensor,
        slot: torch.Tensor,
        token: torch.Tensor,
    ) -> torch.Tensor:
        """[v] float32: of ``token`` [v] in slots ``slot`` [v] of requests ``who`` [v], from ``hidden`` [v, d]."""
        params = self._row_params(rows, who, slot)
        return token_probability(hidden, lm_head, params, self.canvas.traits.mask_token_id, token)

    def _row_params(self, rows: StepRows, who: torch.Tensor, slot: torch.Tensor) -> RowParams:
        """Sampling parameters of the rows of canvas slots ``slot`` of requests ``who``."""
        asks, canvas, view = self.asks(rows.slots), self.canvas, rows.view
        samples, filters = asks.samples, asks.filters
        if samples or filters:
            # A text in blocks may go on at the beginning of a block: draws must not depend on what came before.
            number = canvas.step if canvas.traits.block_length is None else canvas.window_step
            seeds = (canvas.seed, number) if samples else None
            found = sampling_of_rows(who, slot, view.slots, view.prompt_len, canvas.sampling, seeds)
        else:
            found = sampling_of_nobody(canvas.device)
        edits = self.constraints.of_slots(rows, who, slot)
        return RowParams(*found, samples, filters, edits)

    def choose(
        self, rows: StepRows, parts: Sequence[Part], stats: RowStats, found: tuple[Finding, ...]
    ) -> tuple[Choice, Commits]:
        """What the decoders choose from, and what they choose."""
        view, (who, _) = rows.view, rows.predicted_index
        flat = ranking_score(stats, view.options.score, who)
        for decoder, _, _, mine in parts:
            changed = decoder.rescore(stats, flat, view.slots, who)
            flat = changed if mine is None else torch.where(mine, changed, flat)
        score, token, entropy = spread(rows.predicted, rows.place, flat, stats.token, stats.entropy)
        step = DecoderStep(
            view,
            rows.candidates,
            token,
            self._with_prior(score, rows),
            least_commits(view, self.canvas.traits.step_schedule),
            entropy,
            found,
            *self._standing(rows, parts),
        )
        seen = Choice(score, token, entropy)
        if len(parts) == 1:
            return seen, parts[0].decoder.choose(step)
        chosen = [(part.chosen, part.decoder.choose(step.select(part.chosen))) for part in parts]  # type: ignore[arg-type]
        return seen, _together(chosen, view.masked, token)

    def _standing(self, rows: StepRows, parts: Sequence[Part]) -> tuple[torch.Tensor, torch.Tensor] | tuple[()]:
        """What decoders that revise read besides."""
        if not any(part.decoder.revises for part in parts):
            return ()
        view = rows.view
        position = (view.prompt_len.unsqueeze(1) + view.slot_index).clamp(max=view.num_positions - 1)
        return rows.predicted, self.canvas.tokens[view.slots].gather(1, position)

    def _with_prior(self, score: torch.Tensor, rows: StepRows) -> torch.Tensor:
        """Score times certainty density where a request asks for the prior.

        docs/methods/d2cache.md, section 2, step 6.
        """
        return score * rows.view.prior if "sigma" in rows.view.used else score

    def parts(self, rows: StepRows) -> list[Part]:
        """The decoders of a step, each with its share."""
        parts, (who, _) = self.asks(rows.slots).parts, rows.predicted_index
        return [part if part.chosen is None else part._replace(mine=torch.isin(who, part.chosen)) for part in parts]


def _together(parts: list[tuple[torch.Tensor | None, Commits]], none: torch.Tensor, token: torch.Tensor) -> Commits:
    """The commits of several decoders, each of its own rows, as those of the batch; ``none`` is [R, G] bool."""
    slots = torch.zeros_like(none)
    written = token.clone() if any(commits.token is not None for _, commits in parts) else None
    others: dict[str, torch.Tensor] = {}
    for name, nothing in {"revoked": none, "revised": none, "held": none[:, 0]}.items():
        given = [(index, value) for index, commits in parts if (value := getattr(commits, name)) is not None]
        if given:
            others[name] = torch.zeros_like(nothing)
        for index, value in given:
            others[name][index] = value
    for index, commits in parts:
        slots[index] = commits.slots
        if written is not None and commits.token is not None:
            written[index] = commits.token
    return Commits(slots, written, **others)
