"""What a request asks to be done to its logits before a token is chosen: grammars, biases, bans, penalties.

The order is vLLM's: grammar, allowed tokens, biases, minimum length, penalties, banned tokens. Everything is a function
of the request's own text, so that mates and padding cannot change it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class LogitEdits:
    """Edits of the R requests of a step; a table is None where no request of the step uses it.

    Lists of token ids are padded with -1; an empty line means that its request does not use the table.
    """

    allowed: torch.Tensor | None = None  # [R, A] int64, nothing else may be chosen
    bias_ids: torch.Tensor | None = None  # [R, B] int64
    bias: torch.Tensor | None = None  # [R, B] float32, added to those
    stop_ids: torch.Tensor | None = None  # [R, K] int64, not chosen in slots before min_tokens
    min_tokens: torch.Tensor | None = None  # [R] int64
    penalties: torch.Tensor | None = None  # [R, 3] float32: repetition, frequency, presence
    text: torch.Tensor | None = None  # [R, T] int64, tokens that stand in prompt and canvas; -1 elsewhere
    prompt_len: torch.Tensor | None = None  # [R] int64
    banned: torch.Tensor | None = None  # [R, F] int64, never chosen


@dataclass(frozen=True)
class RowEdits:
    """The edits of n rows of logits."""

    edits: LogitEdits
    request: torch.Tensor  # [n] int64, row of the batch each belongs to
    slot: torch.Tensor  # [n] int64, canvas slot each predicts
    # [n, W] int32: nothing but the tokens whose bits are set may be chosen; bit b of word w is token 32 w + b.
    bitmask: torch.Tensor | None = None

    def rows(self, index: torch.Tensor | slice) -> RowEdits:
        """The edits of some rows."""
        bitmask = None if self.bitmask is None else self.bitmask[index]
        return RowEdits(self.edits, self.request[index], self.slot[index], bitmask)

    def apply(self, logits: torch.Tensor) -> None:
        """Change [n, vocab] fp32 logits in place."""
        edits, request = self.edits, self.request
        if self.bitmask is not None:
            _keep_bits(logits, self.bitmask)
        if edits.allowed is not None:
            _keep(logits, edits.allowed[request])
        if edits.bias_ids is not None and edits.bias is not None:
            logits.scatter_add_(1, edits.bias_ids[request].clamp(min=0), edits.bias[request])
        if edits.stop_ids is not None and edits.min_tokens is not None:
            early = self.slot < edits.min_tokens[request]
            _ban(logits, edits.stop_ids[request].masked_fill(~early.unsqueeze(1), -1))
        if edits.penalties is not None:
            self._penalise(logits)
        if edits.banned is not None:
            _ban(logits, edits.banned[request])

    def _penalise(self, logits: torch.Tensor) -> None:
        edits = self.edits
        assert edits.penalties is not None and edits.text is not None and edits.prompt_len is not None
        text = edits.text[self.request]
        position = torch.arange(text.shape[1], device=text.device).unsqueeze(0)
        prompt_len = edits.prompt_len[self.request]
        # A token that is asked about where it stands has not been there before.
        text = text.masked_fill(position == (prompt_len + self.slot).unsqueeze(1), -1)
        stands = text >= 0
        written = stands & (position >= prompt_len.unsqueeze(1))
        # Counts are whole numbers: adding them up is exact in any order.
        seen, count = (
            torch.zeros_like(logits).scatter_add_(1, text.clamp(min=0), where.float()) for where in (stands, written)
        )
        penalties = edits.penalties[self.request]
        repetition, frequency, presence = penalties.unsqueeze(2).unbind(1)
        changed = torch.where(seen > 0, torch.where(logits > 0, logits / repetition, logits * repetition), logits)
        changed = changed - frequency * count - presence * (count > 0)
        off = [penalties[:, i] == value for i, value in enumerate(NO_PENALTIES)]
        logits.copy_(torch.where((off[0] & off[1] & off[2]).unsqueeze(1), logits, changed))


NO_PENALTIES = (1.0, 0.0, 0.0)


def _ban(logits: torch.Tensor, ids: torch.Tensor) -> None:
    """Set the listed ids [n, F] of each row to -inf; -1 is padding."""
    listed, some = _filled(ids)
    # A row without any keeps the logit of the id that stands in for one.
    logits.scatter_(1, listed, logits.gather(1, listed).masked_fill(some, -torch.inf))


def _keep(logits: torch.Tensor, ids: torch.Tensor) -> None:
    """Set all but the listed ids [n, A] of each row to -inf; rows without any stay as they are."""
    listed, some = _filled(ids)
    kept = torch.full_like(logits, -torch.inf).scatter_(1, listed, logits.gather(1, listed))
    logits.copy_(torch.where(some, kept, logits))


def _keep_bits(logits: torch.Tensor, bitmask: torch.Tensor) -> None:
    """Set all tokens of each row to -inf whose bits are not set in ``bitmask`` [n, W] int32."""
    bit = torch.arange(32, dtype=torch.int32, device=bitmask.device)
    # A bit takes four bytes on the way: a few rows at a time.
    for rows, words in zip(logits.split(16), bitmask.split(16), strict=True):
        kept = (words.unsqueeze(2) >> bit) & 1
        rows.masked_fill_(kept.flatten(1)[:, : rows.shape[1]] == 0, -torch.inf)


def _filled(ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids [n, F] whose padding is replaced by an id of the same line (naming one twice changes nothing), or by 0 where
    the line has none; and [n, 1] bool, whether it has any.
    """
    largest = ids.amax(1, keepdim=True)
    return torch.where(ids >= 0, ids, largest.clamp(min=0)), largest >= 0
