"""A grammar that a request's text must follow: what may be written next, and how far one step may go.

A grammar judges a token after all tokens before it, so that its request is written from left to right. In each step the
leftmost mask, the *lead*, takes the best token that the grammar allows. The slots behind it follow in the same step
where nothing is left to decide, or where the decoder would commit what it predicted and the grammar agrees.

The grammar engines are vLLM's (compat/grammars.py). Their state is on the host, one for each request, and starts over
with the request. Nothing here imports vLLM.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch


class Matcher(Protocol):
    """What is used of vLLM's StructuredOutputGrammar."""

    def fill_bitmask(self, bitmask: torch.Tensor, idx: int) -> None:
        """Set the bits of the tokens that may come next in line ``idx``."""

    def accept_tokens(self, request_id: str, tokens: list[int]) -> bool:
        """Go on by these tokens; False if one of them may not come next."""


class DeadEnd:
    """A grammar that allows nothing."""

    def fill_bitmask(self, bitmask: torch.Tensor, idx: int) -> None:
        """See :class:`Matcher`."""
        bitmask[idx] = 0

    def accept_tokens(self, request_id: str, tokens: list[int]) -> bool:
        """See :class:`Matcher`."""
        return False


@dataclass(frozen=True)
class RunPrediction:
    """What a step predicts for the slots of a request from its lead on."""

    lead_token: int  # the best one that the grammar allows
    tokens: Sequence[int]  # of each slot, lead included: the one predicted without the grammar
    candidates: Sequence[bool]  # the slot may be committed in this step
    sure: Sequence[bool]  # its score reaches the request's threshold
    least: int  # slots to commit, if they agree with the grammar


class GrammarState:
    """Where in its grammar a request is.

    Args:
        matcher: at its start.
        bitmask: [1, W] int32 on the host, of the matcher's own width; bit b of word w stands for token 32 w + b.
        never: [W] int32, the tokens that are not chosen whatever the grammar says, but for those that end the text.
        stop_token_ids: tokens that end the text.
    """

    def __init__(
        self, matcher: Matcher, bitmask: torch.Tensor, never: np.ndarray, stop_token_ids: Sequence[int]
    ) -> None:
        self._matcher = matcher
        self._bitmask = bitmask
        self._stop_token_ids = stop_token_ids
        self._choosable = ~never | bits_of(stop_token_ids, len(never))
        self.ended = False
        self._look()

    @property
    def allowed(self) -> np.ndarray:
        """[W] int32, the tokens that may come next."""
        return self._allowed

    def follow(self, run: RunPrediction, longest: int) -> list[int]:
        """The tokens that this step commits from the lead on; the state goes on by them.

        Where nothing may come next, which takes a vocabulary that cannot spell the grammar, a stop token ends the text
        against the grammar: vLLM's own check of every output then ends the request with an error.

        Args:
            longest: most tokens of a step.
        """
        tokens: list[int] = []
        agrees = True
        for i, candidate in enumerate(run.candidates[:longest]):
            if self.ended or not candidate:
                break
            forced, own = self._forced(), run.tokens[i]
            if i == 0:
                token = run.lead_token
            elif forced is not None:
                token = forced
            elif agrees and self._allows(own) and (i < run.least or run.sure[i]):
                token = own
            else:
                break
            # Slots were predicted together with their neighbours: once one of them got another token than predicted,
            # what was predicted behind it goes with a text that is not there.
            agrees &= token == own
            tokens.append(self._accept(token))
        return tokens

    def go_on(self, tokens: Sequence[int]) -> None:
        """Behind these tokens, which stand in the text already."""
        for token in tokens:
            self._accept(token)

    def _accept(self, token: int) -> int:
        if not self._allows(token) or not self._matcher.accept_tokens("", [token]):
            token = self._stop_token_ids[0]
            self.ended = True
        elif token in self._stop_token_ids:
            self.ended = True
        else:
            self._look()
        return token

    def _look(self) -> None:
        self._matcher.fill_bitmask(self._bitmask, 0)
        self._allowed = self._bitmask[0].numpy() & self._choosable

    def _allows(self, token: int) -> bool:
        return bool(self._allowed[token >> 5] & _bit(token))

    def _forced(self) -> int | None:
        """The one token that may come next, or None if there are more."""
        (words,) = self._allowed.nonzero()
        if len(words) != 1:
            return None
        word = int(self._allowed[words[0]]) & 0xFFFFFFFF
        return None if word & (word - 1) else 32 * int(words[0]) + word.bit_length() - 1


def bits_of(tokens: Collection[int], width: int) -> np.ndarray:
    """[width] int32 with the bits of these tokens set."""
    ids = np.fromiter(tokens, dtype=np.int64, count=len(tokens))
    words = np.zeros(width, dtype=np.uint32)
    np.bitwise_or.at(words, ids >> 5, np.uint32(1) << (ids & 31).astype(np.uint32))
    return words.view(np.int32)


def _bit(token: int) -> np.int32:
    """The bit of ``token`` in its word."""
    return np.uint32(1 << (token & 31)).astype(np.int32)
