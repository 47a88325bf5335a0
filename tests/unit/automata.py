"""Grammars made by hand: what may follow each state, as vLLM's grammar engines would say it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st

from tests.unit.batches import MASK, VOCAB

STOP = 7
TOKENS = [t for t in range(VOCAB) if t not in (MASK, STOP)]


@dataclass(frozen=True)
class Automaton:
    """``moves[state]`` maps tokens to states; in the states ``final`` the text may end, which takes :data:`STOP`."""

    moves: tuple[dict[int, int], ...]
    final: frozenset[int]

    def allowed(self, state: int) -> set[int]:
        return {*self.moves[state], *([STOP] if state in self.final else [])}

    def reads(self, tokens: list[int]) -> int | None:
        """The state after ``tokens``, -1 after the stop token; None where one of them was not allowed."""
        state = 0
        for token in tokens:
            if state < 0 or token not in self.allowed(state):
                return None
            state = -1 if token == STOP else self.moves[state][token]
        return state

    def matcher(self) -> AutomatonMatcher:
        return AutomatonMatcher(self)


class AutomatonMatcher:
    """The interface that vLLM's grammars have; strict about what is never asked of them."""

    def __init__(self, automaton: Automaton) -> None:
        self.automaton = automaton
        self.state = 0

    def fill_bitmask(self, bitmask: torch.Tensor, idx: int) -> None:
        assert self.state >= 0, "asked what follows the end"
        bitmask[idx] = sum(1 << token for token in self.automaton.allowed(self.state))

    def accept_tokens(self, request_id: str, tokens: list[int]) -> bool:
        for token in tokens:
            if self.state < 0 or token not in self.automaton.allowed(self.state):
                return False
            self.state = -1 if token == STOP else self.automaton.moves[self.state][token]
        return True


@st.composite
def automata(draw: st.DrawFn) -> Automaton:
    """Some with long stretches where one token alone may follow. From every state something does."""
    count = draw(st.integers(1, 6))
    moves = []
    for _ in range(count):
        width = draw(st.sampled_from([0, 1, 1, 2, 5, 11]))
        tokens = draw(st.lists(st.sampled_from(TOKENS), min_size=width, max_size=width, unique=True))
        moves.append({token: draw(st.integers(0, count - 1)) for token in tokens})
    ends = frozenset(draw(st.sets(st.integers(0, count - 1))))
    return Automaton(tuple(moves), ends | {i for i, m in enumerate(moves) if not m})


def chain(*tokens: int) -> Automaton:
    """One text and no other."""
    moves = [{token: i + 1} for i, token in enumerate(tokens)]
    return Automaton((*moves, {}), frozenset([len(tokens)]))
