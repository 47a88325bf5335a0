"""Small records passed between the stages of a step. Shapes: R rows (requests in this step), T positions, G slots."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch


class DepthCurve(NamedTuple):
    """Two half Gaussians that meet in a peak of height 1, over the depth of a network: from 0 to 1 (rivals.md, 4)."""

    peak: float  # depth
    first: float  # height at depth 0
    last: float  # height at depth 1


# As published for LLaDA-8B-Instruct.
_LLADA_DRIFT = DepthCurve(0.75, 0.03 / 0.25, 0.13 / 0.25)


@dataclass(frozen=True)
class FamilyTraits:
    """What the decoding loop must know of a model family (d2cache.md, section 9).

    Attributes:
        mask_token_id: the token a canvas starts from.
        logit_shift: canvas slot g reads the logits of position P + g - logit_shift.
        step_schedule: what the option ``steps`` means (samplers/schedule.py): ``even`` as LLaDA's code has it,
            ``timestep`` as Dream's.
        num_layers: of the network, for policies that treat its layers differently.
        drift_by_depth: where in it representations change most from step to step.
        block_length: a row sees its own block of so many positions and all earlier ones; None = it sees all positions.
    """

    mask_token_id: int
    logit_shift: int = 0
    step_schedule: str = "even"
    num_layers: int = 1
    drift_by_depth: DepthCurve = _LLADA_DRIFT
    block_length: int | None = None


@dataclass(frozen=True)
class EditSpec:
    """What a request asks to be done to its logits before a token is chosen."""

    allowed: tuple[int, ...] = ()  # nothing else may be chosen; () = anything
    bias: tuple[tuple[int, float], ...] = ()  # token id, what is added to its logit
    banned: tuple[int, ...] = ()  # never chosen
    min_tokens: int = 0  # in this many first slots none of ``stop_ids`` is chosen
    stop_ids: tuple[int, ...] = ()
    penalties: tuple[float, float, float] = (1.0, 0.0, 0.0)  # repetition, frequency, presence; these = off


@dataclass(frozen=True)
class SamplingSpec:
    """The part of a request's sampling parameters that the row statistics need."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    stop_token_ids: tuple[int, ...] = ()  # end-of-text included unless the request ignores it
    num_logprobs: int | None = None  # alternatives to report with each token; None = no log-probabilities
    edits: EditSpec = EditSpec()


class OptionColumns(NamedTuple):
    """Per-request numbers of the rows in this step, each [R]; see config.RequestOptions for their meaning."""

    window: torch.Tensor  # int64, already resolved to a length in 1..G
    tokens_per_step: torch.Tensor  # int64
    threshold: torch.Tensor  # float32, 0 = off
    factor: torch.Tensor  # float32, 0 = off
    score: torch.Tensor  # int64, index into config.SCORES
    sigma: torch.Tensor  # float32
    selection_sigma: torch.Tensor  # float32
    current_k: torch.Tensor  # int64
    rollout_p: torch.Tensor  # float32
    inflate_w: torch.Tensor  # int64
    latest_memory: torch.Tensor  # bool
    steps: torch.Tensor  # int64, 0 = tokens_per_step decides
    longest_run: torch.Tensor  # int64, most tokens that a step commits from left to right; 0 = in any order


@dataclass(frozen=True)
class CanvasView:
    """The canvases of the rows in this step. Columns past a row's own T or G are padding and False."""

    slots: torch.Tensor  # [R] int64, row -> slot
    prompt_len: torch.Tensor  # [R] int64
    canvas_len: torch.Tensor  # [R] int64
    masked: torch.Tensor  # [R, G] bool, canvas slots that still hold the mask
    live: torch.Tensor  # [R, G] bool, canvas slots before the first committed stop token
    window_start: torch.Tensor  # [R] int64, first slot of the current window
    num_positions: int  # T, the widest of the batch
    options: OptionColumns

    @property
    def slot_index(self) -> torch.Tensor:
        """[1, G] int64."""
        return torch.arange(self.masked.shape[1], device=self.masked.device).unsqueeze(0)

    @property
    def in_canvas(self) -> torch.Tensor:
        """[R, G] bool: the column is one of the row's own slots."""
        return self.slot_index < self.canvas_len.unsqueeze(1)

    @property
    def lead(self) -> torch.Tensor:
        """[R] int64: the leftmost mask that may still become a token; 0 where there is none."""
        return (self.masked & self.live).to(torch.int8).argmax(1)

    @property
    def in_text(self) -> torch.Tensor:
        """[R, T] bool: the column is one of the row's own positions."""
        position = torch.arange(self.num_positions, device=self.masked.device).unsqueeze(0)
        return position < (self.prompt_len + self.canvas_len).unsqueeze(1)

    @property
    def in_window(self) -> torch.Tensor:
        """[R, G] bool: the slot lies in the current window."""
        start = self.window_start.unsqueeze(1)
        inside = (self.slot_index >= start) & (self.slot_index < start + self.options.window.unsqueeze(1))
        return inside & self.in_canvas

    def select(self, rows: torch.Tensor) -> CanvasView:
        """The view of some rows only."""
        return CanvasView(
            self.slots[rows],
            self.prompt_len[rows],
            self.canvas_len[rows],
            self.masked[rows],
            self.live[rows],
            self.window_start[rows],
            self.num_positions,
            OptionColumns(*(column[rows] for column in self.options)),
        )


class Drift(NamedTuple):
    """How the attention of the rows that may be committed has changed since the last step (attention/drift.py)."""

    # [R] float32, cosine similarity in the layer that changed most; 0 where nothing can be compared
    similarity: torch.Tensor
    attended: torch.Tensor  # [R, T] bool, of each layer the known position that received most


class WatchedRows(NamedTuple):
    """The rows of one request whose attention is measured: those of the slots that may be committed."""

    rows: torch.Tensor  # [n] int64, as indices into the request's rows
    positions: torch.Tensor  # [n] int64 ascending
    known: torch.Tensor  # [T] bool, positions that hold no mask


@dataclass(frozen=True)
class StepOutcome:
    """What a step found out and did; filled by the denoiser, read by the cache policy."""

    committed: torch.Tensor  # [R, G] bool
    predicted: torch.Tensor  # [R, G] bool, slots whose row statistics exist
    score: torch.Tensor  # [R, G] float32, the ranking statistic without prior; only where predicted
    window_start: torch.Tensor  # [R] int64, the window in which this step committed
    first: torch.Tensor  # [R] bool, the request's first step
    importance: torch.Tensor | None  # [R, T] float32, attention rollout; None where no policy reads it
    entropy: torch.Tensor | None = None  # [R, G] float32, nats, 0 where not predicted; None where no policy reads it
    drift: Drift | None = None  # None where no policy reads it

    def select(self, rows: torch.Tensor) -> StepOutcome:
        """The outcome of some rows only."""
        return StepOutcome(
            self.committed[rows],
            self.predicted[rows],
            self.score[rows],
            self.window_start[rows],
            self.first[rows],
            None if self.importance is None else self.importance[rows],
            None if self.entropy is None else self.entropy[rows],
            None if self.drift is None else Drift(*(part[rows] for part in self.drift)),
        )


# Highest rank of proxies that a request may ask for: each layer keeps so many directions.
MOST_DIRECTIONS = 256


class StoredOutputs(NamedTuple):
    """Refreshed rows that layers behind the first one need not compute, as they have stored an output for them."""

    rows: torch.Tensor  # [R, T] bool, positions from the one before the canvas on
    compared: torch.Tensor  # [R, T] bool, of these: their values are recomputed in every layer, and
    # [R, layers - 1] int64: so many of them, whose values changed most, are computed after all by each layer.
    count: torch.Tensor
    # [R] int64, of policies with ``compares_proxies``: compared are the components of the values along so many leading
    # directions of their projection, and K is renewed with V; 0 = the values, and V alone. None = 0 for all.
    proxy_rank: torch.Tensor | None = None


@dataclass(frozen=True)
class StoredRows:
    """StoredOutputs of the rows of a step, as the layers need them."""

    stored: torch.Tensor  # [N] bool
    compared: torch.Tensor  # [m] int64 ascending rows
    request: torch.Tensor  # [N] int64, row of the batch each belongs to
    count: torch.Tensor  # [R, layers - 1] int64
    computed: list[list[int]]  # of each layer behind the first one: rows of each request that it computes
    # Of the compared rows, those compared by proxies: [m] int64 into ``compared``, and the rank of each. None where no
    # policy compares proxies.
    proxied: tuple[torch.Tensor, torch.Tensor] | None
    kept: dict[int, tuple[torch.Tensor, torch.Tensor]]  # request -> its rows whose outputs are kept, and their places
    capacity: dict[int, int]  # request -> places


class RowExits(NamedTuple):
    """Refreshed rows that leave the network behind some layer: deeper layers keep the K and V they have for them.

    Which rows leave is decided in the forward pass: those with the smallest bias + weight * change, where change is how
    far the hidden state moved since a step in which the row stayed (ops/hidden_change.py).
    """

    # [R, layers] int64: of the rows from the position before the canvas on, so many stay behind this layer, or all if
    # there are fewer; -1 = the layer lets all pass, and remembers no hidden states.
    keep: torch.Tensor
    bias: torch.Tensor  # [R, T] float32
    weight: torch.Tensor  # [R] float32


@dataclass(frozen=True)
class ExitingRows:
    """RowExits of the rows of a step, as the layers need them."""

    staying: list[list[int]]  # of each layer: rows of each request behind it
    exits: list[dict[int, int]]  # of each layer: request -> how many of its ``remembered`` rows stay
    remembered: dict[int, tuple[torch.Tensor, torch.Tensor]]  # request -> rows with a memory, and their places
    capacity: dict[int, int]  # request -> places
    request: torch.Tensor  # [N] int64, row of the batch each belongs to
    bias: torch.Tensor  # [N] float32
    weight: torch.Tensor  # [N] float32


class KeptKeys(NamedTuple):
    """Keys beyond the visible ones, another set in each layer; each [R]. A request may choose them once in a while."""

    choose: torch.Tensor  # bool, the step attends to everything, and each layer chooses of what is not visible
    apply: torch.Tensor  # bool, the step attends to the visible positions and to those its layer has chosen
    count: torch.Tensor  # int64, how many a layer chooses: by their scores under the window's mean query
    pool: torch.Tensor  # int64, width of the neighbourhood whose best score counts (ops/key_choice.py)


@dataclass(frozen=True)
class KeyChoice:
    """KeptKeys of one request, as the layers need it."""

    choose: bool  # else apply
    visible: torch.Tensor  # [n] int64, ascending positions that every layer sees
    queries: torch.Tensor  # [b] int64, the window's rows, as indices into the request's rows
    count: int
    pool: int


@dataclass(frozen=True)
class StepPlan:
    """What a cache policy wants of the next step."""

    refresh: torch.Tensor  # [R, T] bool, positions whose K and V are recomputed
    observe: torch.Tensor  # [R, G] bool, slots whose statistics the policy wants besides the window's
    candidates: torch.Tensor | None = None  # [R, G] bool, slots that may be committed; None = all of the window
    # [R, T] bool, keys that the rows attend to: each must have been refreshed in this step or an earlier one. Of
    # policies with ``hides_keys``; None = all.
    visible: torch.Tensor | None = None
    kept: KeptKeys | None = None  # of policies with ``hides_keys`` whose key sets differ between layers
    stored: StoredOutputs | None = None  # of policies with ``stores_outputs``
    exits: RowExits | None = None  # of policies with ``drops_rows``


@dataclass(frozen=True)
class StepRows:
    """The rows that go through the network in this step: ragged, request by request, ascending positions.

    Behind them stand shadow rows (ops/shadow_attention.py), request by request, if a decoder verifies. In a padded step
    a request has as many rows as it may need at most, known without a word from the device; its last ones are padding,
    and likewise its last predicted slots.
    """

    view: CanvasView
    slots: list[int]  # of the requests, on the host
    counts: list[int]  # rows of each request, padding included
    bounds: list[int]  # rows that each request can need in this step: all positions in its first, then its budget
    refreshed: torch.Tensor  # [R] int64, rows of each request without padding and shadows
    full: list[bool]  # every position of the request is refreshed; False where padding hides it
    reads_importance: list[bool]  # the request's policy wants the attention rollout
    keys: list[torch.Tensor | None]  # of each request: [n] int64 ascending positions its rows attend to; None = all
    choices: list[KeyChoice | None]  # of each request whose keys differ from layer to layer
    stored: StoredRows | None  # where some request's policy stores outputs
    exiting: ExitingRows | None  # where some request's policy drops rows
    watched: list[WatchedRows | None]  # of each request whose policy reads drift
    positions: torch.Tensor  # [N] int64, absolute
    input_ids: torch.Tensor  # [N] int32
    request: torch.Tensor  # [N - shadows] int64, row of the batch each belongs to
    live: torch.Tensor  # [N - shadows] bool, not a padding row
    candidates: torch.Tensor  # [R, G] bool, slots that may be committed
    predicted: torch.Tensor  # [R, G] bool, slots whose statistics are taken
    # [n] request and [n] slot of each predicted slot, row-major; slot G, which is none, where there is padding.
    predicted_index: tuple[torch.Tensor, torch.Tensor]
    logits_rows: torch.Tensor  # [n + v] int64 into N, one for each predicted slot, then for each verified one
    verified_index: tuple[torch.Tensor, torch.Tensor]  # [v] request and [v] slot of each committed slot asked about
    shadows: list[int]  # of each request: rows that stand at the end of all rows and are in no cache

    def by_slot(self, values: torch.Tensor) -> torch.Tensor:
        """[n] numbers of the predicted slots as [R, G] over all slots, 0 elsewhere."""
        table = values.new_zeros(self.predicted.shape[0], self.predicted.shape[1] + 1)
        # Padding lands in a column that is cut off.
        table[self.predicted_index] = values
        return table[:, :-1]

    def without(self, present: torch.Tensor) -> tuple[StepRows, torch.Tensor]:
        """The same once it is known which rows have left: a slot that is read from such a row has no logits.

        Decoders that verify go with policies that compute everything: rows of their requests do not leave.

        Args:
            present: [N - shadows] bool.

        Returns:
            And [m] int64, which of ``logits_rows`` are left.
        """
        (who, slot), count = self.predicted_index, len(self.predicted_index[0])
        asked = present[self.logits_rows[:count]].nonzero().flatten()
        verified = torch.arange(count, len(self.logits_rows), device=asked.device)
        stayed = torch.cat([asked, verified])
        predicted = torch.zeros_like(self.predicted)
        predicted[who[asked], slot[asked]] = True
        rows = replace(
            self,
            candidates=self.candidates & predicted,
            predicted=predicted,
            predicted_index=(who[asked], slot[asked]),
            logits_rows=self.logits_rows[stayed],
        )
        return rows, stayed


@dataclass(frozen=True)
class StepResult:
    """What the engine is told after a step."""

    tokens: torch.Tensor  # [R, G] int64, newly contiguous tokens, left-aligned
    num_tokens: torch.Tensor  # [R] int32, how many of them
    committed: torch.Tensor  # [R, G] bool
    masked: torch.Tensor  # [R, G] bool, after the commits
    revoked: torch.Tensor | None = None  # [R, G] bool, committed earlier and masked again; None where nobody verifies
