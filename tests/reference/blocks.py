"""Networks whose rows see their own block and all earlier ones, and what their decoding loops have in common.

Positions are cut into blocks of b from position 0 on, prompt included. K and V of a block are final once they have been
computed from its final tokens; a loop that says "store" does just that. Batch of one, greedy, plain loops.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch

from tests.reference.dense import DenseModel
from tests.reference.dream import DenseDream
from tests.reference.oracle import ORACLE

BLOCK_ORACLE = ORACLE / "block"


class BlockModel(DenseModel):
    """A network with a cache of final K and V. Heads need not be an even part of the width."""

    keys_of_config = DenseDream.keys_of_config

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.head_dim = self.config.get("head_dim") or self.head_dim

    def rows(self, tokens: list[int], first: int, keys: int) -> torch.Tensor:
        """Logits [n, vocab] of rows from position ``first`` on that see positions below ``keys``; writes K and V."""
        self.visible = torch.arange(keys)
        hidden, _ = self.forward(torch.tensor(tokens), torch.arange(first, first + len(tokens)))
        return self.lm_head(hidden)

    def store(self, tokens: list[int], first: int, length: int) -> torch.Tensor:
        """K and V of whole blocks of ``length``, block by block, from their final tokens; logits [n, vocab]."""
        starts = range(0, len(tokens), length)
        return torch.cat([self.rows(tokens[s : s + length], first + s, first + s + length) for s in starts])


@dataclass
class Forward:
    """One forward pass and what was done with it: the fields of a trace's step."""

    kind: str  # prefill, denoise or commit; "store" = one that the traced code does not have
    block: int
    rows: tuple[int, int]
    keys: tuple[int, int]
    tokens_in: list[int] | None = None
    in_block_step: int | None = None
    sub_block: int | None = None
    committed: list[tuple[int, int]] = field(default_factory=list)
    edited: list[tuple[int, int, int]] = field(default_factory=list)
    confidence: list[float | None] | None = None
    argmax: list[int] | None = None


class Loop:
    """A request on its way. ``forwards`` yields the steps; afterwards ``tokens`` and ``output`` stand."""

    defaults: ClassVar[dict[str, Any]] = {}

    def __init__(self, model: BlockModel, prompt: list[int], settings: dict[str, Any]) -> None:
        self.model, self.prompt = model, len(prompt)
        self.settings = {**self.defaults, **settings}
        self.length: int = self.settings["block_length"]
        self.eos: list[int] = self.settings["eos_ids"]
        self.mask: int = model.config["mask_token_id"]
        self.tokens = list(prompt)
        self.output: list[int] = []
        model.reset(self.whole_blocks(len(prompt) + self.budget) + self.length)

    @property
    def budget(self) -> int:
        """Most new tokens."""
        return self.settings["gen_length"]

    def whole_blocks(self, positions: int) -> int:
        """``positions``, rounded up to whole blocks."""
        return -(-positions // self.length) * self.length

    def masked(self, start: int, end: int) -> list[int]:
        """Positions that hold a mask."""
        return [i for i in range(start, end) if self.tokens[i] == self.mask]

    def forwards(self) -> Iterator[Forward]:
        """Run to the end."""
        raise NotImplementedError

    def prefill(self) -> torch.Tensor | None:
        """Store the prompt's whole blocks; logits of their rows, or None if there are none."""
        end = self.prompt // self.length * self.length
        return self.model.store(self.tokens[:end], 0, self.length) if end else None

    def denoise(self, start: int, end: int) -> tuple[dict[int, int], dict[int, float]]:
        """Most probable token and its probability, of each position of the block."""
        return best(self.model.rows(self.tokens[start:end], start, end), start)

    def store(self, start: int, end: int) -> torch.Tensor:
        """K and V of a finished block; its rows' logits."""
        return self.model.store(self.tokens[start:end], start, self.length)

    def cut(self, tokens: list[int]) -> list[int]:
        """Up to the first end token, included."""
        ends = [i for i, token in enumerate(tokens) if token in self.eos]
        return tokens[: ends[0] + 1] if ends else tokens


def best(logits: torch.Tensor, first: int) -> tuple[dict[int, int], dict[int, float]]:
    """Token and probability of each row; the keys are positions from ``first`` on."""
    top = logits.softmax(-1).max(-1)
    positions = range(first, first + len(logits))
    return (
        dict(zip(positions, top.indices.tolist(), strict=True)),
        dict(zip(positions, top.values.tolist(), strict=True)),
    )


def most_confident(confidence: dict[int, float], among: list[int], count: int) -> list[int]:
    """The ``count`` positions of the highest confidence, or as many as there are."""
    return sorted(sorted(among, key=lambda i: (-confidence[i], i))[:count])


def quota(length: int, steps: int, k: int) -> int:
    """Tokens that step ``k`` of ``steps`` commits at least in a block of ``length``."""
    return length // steps + (k < length % steps)


def filtered(logits: torch.Tensor, temperature: float, top_k: int, top_p: float) -> torch.Tensor:
    """[n, vocab] probabilities that a token is drawn from; ``top_k`` 0 = all. The token crossing ``top_p`` stays."""
    logits = logits / temperature
    for row in logits:
        order = row.argsort(descending=True, stable=True)
        if top_k:
            row[order[top_k:]] = -torch.inf
        mass = row[order].softmax(-1).cumsum(-1)
        row[order[1:][mass[:-1] > top_p]] = -torch.inf
    return logits.softmax(-1)


def load_trace(name: str) -> dict[str, Any]:
    """A trace file."""
    return json.loads((BLOCK_ORACLE / "traces" / f"{name}.json").read_text())


def trace_names() -> list[str]:
    """All traces."""
    return sorted(path.stem for path in (BLOCK_ORACLE / "traces").glob("*.json"))
