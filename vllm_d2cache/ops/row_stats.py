"""Statistics of logits rows: which token a masked position would take, and how sure the model is of it.

The spec is docs/methods/d2cache.md, section 2, step 4. Everything is computed in fp32, whatever the model's dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from vllm_d2cache.ops.dispatch import chosen, dispatched
from vllm_d2cache.ops.logit_edits import RowEdits
from vllm_d2cache.ops.row_filter import filter_logits

# Rows whose logits exist at one time: bounds the transient to ROWS_PER_TILE x vocabulary, whatever the batch.
ROWS_PER_TILE = 64
# A small vocabulary has more rows in a tile, up to so many logits: 64 rows of a large one are eight times as many.
TILE_LOGITS = 1 << 20
# On a GPU each tile reads the LM head (1 GB for 8B models) again: more rows where a kernel takes the statistics from
# the logits as they come, so that this is not what takes the time.
KERNEL_ROWS_PER_TILE = 512
# Bytes that a logit takes at most in a tile of ROWS_PER_TILE rows: itself, and what filters, statistics, edits and
# readers make of it (tests/unit/engine/test_memory_plan.py).
_BYTES_PER_LOGIT = 64

TileReader = Callable[[int, int, torch.Tensor], None]
"""Called with (i, j, logits) for rows i to j: [j - i, vocab] fp32, scaled and filtered; it may change them in place."""


@dataclass(frozen=True)
class RowParams:
    """Sampling parameters of each row; empty where no row samples or filters."""

    temperature: torch.Tensor  # [n] float32, 0 = greedy
    top_p: torch.Tensor  # [n] float32, 1 = off
    top_k: torch.Tensor  # [n] int64, 0 = off
    draw: torch.Tensor | None  # [n] float64 uniform numbers for sampling; None where no row samples
    samples: bool  # some row has a temperature
    filters: bool  # some row has a top_p or top_k
    edits: RowEdits | None = None  # made before temperature and filters

    def tile(self, i: int, j: int) -> RowParams:
        """The parameters of rows i to j."""
        return self._part(slice(i, j))

    def rows(self, index: torch.Tensor) -> RowParams:
        """The parameters of the rows ``index`` [m] int64."""
        return self._part(index)

    def _part(self, rows: slice | torch.Tensor) -> RowParams:
        edits = None if self.edits is None else self.edits.rows(rows)
        if not (self.samples or self.filters):  # of the others nothing is read
            return self if edits is None else replace(self, edits=edits)
        return RowParams(
            self.temperature[rows],
            self.top_p[rows],
            self.top_k[rows],
            None if self.draw is None else self.draw[rows],
            self.samples,
            self.filters,
            edits,
        )


@dataclass(frozen=True)
class RowStats:
    """Statistics of n rows; margin and entropy only where some request ranks by them."""

    token: torch.Tensor  # [n] int64
    confidence: torch.Tensor  # [n] float32: probability of ``token``
    margin: torch.Tensor | None  # [n] float32: top probability minus the second
    entropy: torch.Tensor | None  # [n] float32, nats, >= 0


def row_stats(
    hidden: torch.Tensor,
    lm_head: Callable[[torch.Tensor], torch.Tensor],
    params: RowParams,
    mask_token_id: int,
    want_margin: bool,
    want_entropy: bool,
    readers: Sequence[TileReader] = (),
    vocab_size: int | None = None,
) -> RowStats:
    """Statistics of the logits of ``hidden``, computed a tile of rows at a time.

    Args:
        hidden: [n, d] final hidden states.
        lm_head: maps [m, d] to [m, vocab] logits.
        mask_token_id: never chosen, though it keeps its share of the softmax.
        readers: called with the logits of each tile before their statistics are taken.
        vocab_size: how many logits a row has; None = the first tile shows it.
    """
    tiles = []
    # Readers and edits see the logits as they are chosen from; without them one pass does it all.
    scaled = bool(readers) or params.edits is not None
    by_kernel = chosen(hidden.device) != "torch" and not scaled
    step = ROWS_PER_TILE if vocab_size is None else rows_per_tile(vocab_size)
    if by_kernel:
        step = KERNEL_ROWS_PER_TILE
    j = 0
    while (i := j) < hidden.shape[0]:
        j = min(i + step, hidden.shape[0])
        part = params.tile(i, j)
        logits = lm_head(hidden if j - i == hidden.shape[0] else hidden[i:j])
        if not by_kernel:
            step = rows_per_tile(logits.shape[1])
        if scaled:
            logits = scaled_logits(logits, part, mask_token_id)
        for read in readers:
            read(i, j, logits)
        tiles.append(tile_stats(logits, part, mask_token_id, want_margin, want_entropy, scaled))
    if not tiles:
        none = torch.empty(0, device=hidden.device)
        return RowStats(none.long(), none, none if want_margin else None, none if want_entropy else None)
    if len(tiles) == 1:
        return tiles[0]
    return RowStats(
        torch.cat([t.token for t in tiles]),
        torch.cat([t.confidence for t in tiles]),
        torch.cat([t.margin for t in tiles if t.margin is not None]) if want_margin else None,
        torch.cat([t.entropy for t in tiles if t.entropy is not None]) if want_entropy else None,
    )


def rows_per_tile(vocab_size: int) -> int:
    """Most rows of a tile where no kernel reads the logits as they come."""
    return max(ROWS_PER_TILE, TILE_LOGITS // vocab_size)


def statistics_bytes(vocab_size: int, itemsize: int) -> int:
    """Bytes that :func:`row_stats` takes for logits of ``itemsize`` bytes, at most; gathered logits exist twice."""
    return vocab_size * max(KERNEL_ROWS_PER_TILE * 2 * itemsize, rows_per_tile(vocab_size) * _BYTES_PER_LOGIT)


def token_probability(
    hidden: torch.Tensor,
    lm_head: Callable[[torch.Tensor], torch.Tensor],
    params: RowParams,
    mask_token_id: int,
    token: torch.Tensor,
) -> torch.Tensor:
    """[v] float32: probability of ``token`` [v] int64 in the row of ``hidden`` [v, d], a tile of rows at a time."""
    tiles = []
    for i in range(0, hidden.shape[0], ROWS_PER_TILE):
        j = min(i + ROWS_PER_TILE, hidden.shape[0])
        logits = scaled_logits(lm_head(hidden[i:j]), params.tile(i, j), mask_token_id)
        tiles.append(torch.softmax(logits, dim=-1).gather(1, token[i:j].unsqueeze(1)).squeeze(1))
    return torch.cat(tiles) if tiles else torch.empty(0, device=hidden.device)


def scaled_logits(logits: torch.Tensor, params: RowParams, mask_token_id: int) -> torch.Tensor:
    """[m, vocab] logits in fp32, after edits, temperature, nucleus and top-k; ``logits`` may be overwritten."""
    if logits.dtype != torch.float32:
        logits = logits.float()
    if params.edits is not None:
        params.edits.apply(logits)
    if params.samples:
        logits /= torch.where(params.temperature > 0, params.temperature, 1.0).unsqueeze(1)
    if params.filters:
        filter_logits(logits, params.top_p, params.top_k, mask_token_id)
    return logits


@dispatched("vllm_d2cache.ops.triton.row_stats")
def tile_stats(
    logits: torch.Tensor,
    params: RowParams,
    mask_token_id: int,
    want_margin: bool,
    want_entropy: bool,
    scaled: bool = False,
) -> RowStats:
    """Statistics of [m, vocab] logits, which may be overwritten; ``scaled``: they come from :func:`scaled_logits`."""
    if not scaled:
        logits = scaled_logits(logits, params, mask_token_id)
    probs = torch.softmax(logits, dim=-1)
    margin = entropy = None
    if want_margin:
        top = probs.topk(2, dim=-1).values
        margin = top[:, 0] - top[:, 1]
    if want_entropy:
        entropy = -(probs * (probs + 1e-10).log()).sum(-1)
    mask = _column(mask_token_id, logits.device)
    if params.samples or scaled:  # else the token below is another one, and no other probability is read
        probs.index_fill_(1, mask, 0.0)
    # Not the argmax of the probabilities: under a mask logit far above the others they are all zero.
    logits.index_fill_(1, mask, -torch.inf)
    token = logits.argmax(-1)
    if params.samples:
        cumulative = probs.double().cumsum(-1)
        assert params.draw is not None
        target = params.draw.unsqueeze(1) * cumulative[:, -1:]
        drawn = torch.searchsorted(cumulative, target, right=True).clamp(max=probs.shape[1] - 1)
        drawable = (params.temperature > 0) & (cumulative[:, -1] > 0)
        token = torch.where(drawable, drawn.squeeze(1), token)
    confidence = probs.gather(1, token.unsqueeze(1)).squeeze(1)
    return RowStats(token, confidence, margin, entropy)


@lru_cache(maxsize=8)
def _column(number: int, device: torch.device) -> torch.Tensor:
    """[1] int64: the number. Shared: it is never written."""
    return torch.tensor([number], device=device)
