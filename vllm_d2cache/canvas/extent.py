"""How much of a request's text a scheduler knows of, and how much of it a step computes.

Where a row sees all positions, that is the whole text at once. Where it sees its own block and those before it, the
prompt is computed in *pieces* of whole blocks, and the text grows block by block: it reaches one block beyond that of
the first token which is still to be emitted, as a worker may be a step ahead of what its scheduler has heard.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Extent:
    """Of one request; all numbers are positions.

    Attributes:
        prompt_len: P.
        total: its text, and room for rows behind it.
        budget: most rows of a step, once all that comes before them has been computed.
        block: positions of a block; 0 = a row sees all positions.
        piece: most positions of the prompt that a step computes, whole blocks; 0 = as many as there are.
        behind: how many of the positions before its open block the first step of that block computes anyway.
    """

    prompt_len: int
    total: int
    budget: int
    block: int = 0
    piece: int = 0
    behind: int = 0

    def known(self, emitted: int) -> int:
        """How far its text reaches when so many tokens have been emitted."""
        return min(self.total, self.settled(emitted) + 2 * self.block) if self.block else self.total

    def settled(self, emitted: int) -> int:
        """Positions of blocks that are full of the prompt and of emitted tokens: K and V of these never change."""
        return settled_positions(self.prompt_len, emitted, self.block)

    def reusable(self, emitted: int) -> int:
        """Positions of these that need no computing before the open block's first step."""
        return max(0, self.settled(emitted) - self.behind)

    def resumed_at(self, emitted: int) -> int:
        """The computed count that makes a step after the first one an extension by ``budget``."""
        return max(0, self.known(emitted) - self.budget)

    def first(self, start: int, emitted: int) -> int:
        """Positions that a step computes which begins at ``start``, before which all has been computed."""
        left = self.known(emitted) - start
        if not self.piece or left <= self.piece:
            return left
        return min(start + self.piece, self.reusable(emitted)) - start

    def later(self, start: int, emitted: int) -> int:
        """A bound on the rows of any later step of its own, where ``start`` positions have been computed."""
        return max(self.budget, min(self.piece, self.known(emitted) - start))


def settled_positions(prompt_len: int, emitted: int, block: int) -> int:
    """Positions of the whole blocks of a prompt and ``emitted`` tokens behind it; 0 where there are no blocks."""
    position = prompt_len + emitted
    return position - position % block if block else 0


def piece_length(asked: int, budget: int, block: int) -> int:
    """The longest piece of a prompt: ``asked`` in whole blocks; 0 = a quarter of the ``budget`` of rows of a batch.

    Never less than three blocks: a step may have two blocks and a row.
    """
    return max(3 * block, (asked or budget // 4) // block * block)
