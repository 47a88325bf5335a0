"""d2Cache inside a block in plain loops: one greedy request.

A family may read a slot one row to its left (``shift`` 1): then a block's first token comes from the pass that stores
the block before it, and the rows that fill the chosen masks are the ones to their left. A window is a part of the block
in which tokens may be committed now.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from tests.reference.blocks import BlockModel


@dataclass
class PartialStep:
    """What one step computes and does; positions are absolute."""

    rows: list[int]
    committed: list[list[int]]  # position, token
    confidence: dict[int, float]  # of the masks whose rows were computed


def density(known: list[bool], sigma: float) -> list[float]:
    """Section 3.2 of docs/methods/d2cache.md with the block as the canvas: known before it, its last slot behind it."""
    b = len(known)
    if not sigma:
        return [1.0] * b
    extended = [True] * b + known + [known[-1]] * b

    def weight(distance: int) -> float:
        return math.exp(-(distance**2) / (2 * sigma**2))

    norm = sum(weight(d) for d in range(-3 * b, 3 * b))
    return [sum(weight(j - b - i) for j, there in enumerate(extended) if there) / norm for i in range(b)]


class D2CacheBlocks:
    """A request for ``max_tokens`` behind ``prompt``; ``steps`` yields what is done."""

    def __init__(self, model: BlockModel, prompt: list[int], max_tokens: int, length: int, **options: float) -> None:
        self.model, self.length, self.prompt = model, length, len(prompt)
        self.k, self.sigma = int(options["current_k"]), options["selection_sigma"]
        self.inflate, self.threshold = int(options["inflate_w"]), options["threshold"]
        self.latest, self.shift = bool(options.get("latest", 0)), int(options.get("shift", 0))
        self.window = int(options.get("window", 0)) or length
        self.mask = model.config["mask_token_id"]
        total = -(-(len(prompt) + max_tokens) // length) * length
        self.tokens = prompt + [self.mask] * (total - len(prompt))
        self.stop = len(prompt) + max_tokens
        model.reset(total)

    def compute(self, rows: list[int]) -> dict[int, torch.Tensor]:
        """Logits by position; the rows of a block see all positions before its end."""
        found: dict[int, torch.Tensor] = {}
        for start in range(0, len(self.tokens), self.length):
            mine = [p for p in rows if start <= p < start + self.length]
            if mine:
                self.model.visible = torch.arange(start + self.length)
                tokens = torch.tensor([self.tokens[p] for p in mine])
                hidden, _ = self.model.forward(tokens, torch.tensor(mine))
                found.update(zip(mine, self.model.lm_head(hidden), strict=True))
        return found

    def steps(self) -> Iterator[PartialStep]:
        """Block by block, until the last token that is wanted stands."""
        stored, start = 0, self.prompt - self.prompt % self.length
        while start < self.stop:
            if self.shift and start >= self.prompt:
                yield self.step(list(range(stored, start)), [start])
                stored = start
            yield from self.block(start, stored)
            stored, start = start, start + self.length

    def block(self, start: int, stored: int) -> Iterator[PartialStep]:
        """The steps of the block at ``start``; the first one computes what comes before it and is not ``stored``."""
        end = start + self.length
        rows, memory, when = list(range(stored, end)), dict[int, float](), dict[int, int]()
        number = 0
        while masked := self.masks(start, end):
            if not self.masks(start, self.stop):
                return
            step = self.step(rows, masked)
            yield step
            number += 1
            if self.latest or number == 1:
                memory.update(step.confidence)
            last = [p for p, _ in step.committed]
            when.update(dict.fromkeys(last, number))
            rows = self.chosen(start, self.masks(start, end), last, memory, when)

    def masks(self, start: int, end: int) -> list[int]:
        """Slots with a mask; mask text in the prompt is prompt."""
        return [p for p in range(max(start, self.prompt), end) if self.tokens[p] == self.mask]

    def now(self, masked: list[int]) -> range:
        """The window that holds the first mask."""
        start = masked[0] - masked[0] % self.window
        return range(start, start + self.window)

    def step(self, rows: list[int], masked: list[int]) -> PartialStep:
        """Compute ``rows``, commit what is confident enough among the window's masks that they fill, or the best."""
        logits = self.compute(rows)
        best: dict[int, tuple[int, float]] = {}
        for p in [p for p in masked if p - self.shift in logits]:
            share = logits[p - self.shift].softmax(-1)
            share[self.mask] = 0
            best[p] = int(share.argmax()), float(share.max())
        candidates = [p for p in best if p in self.now(masked)]
        chosen = [p for p in candidates if best[p][1] >= self.threshold > 0]
        chosen = chosen or [max(candidates, key=lambda p: (best[p][1], -p))]
        for p in chosen:
            self.tokens[p] = best[p][0]
        return PartialStep(rows, [[p, best[p][0]] for p in chosen], {p: c for p, (_, c) in best.items()})

    def chosen(
        self, start: int, masked: list[int], last: list[int], memory: dict[int, float], when: dict[int, int]
    ) -> list[int]:
        """The rows of the block's next step."""
        block = range(start, start + self.length)
        if self.k >= self.length or not masked:
            return list(block)
        weight = density([p not in masked for p in block], self.sigma)
        now, kth = self.now(masked), masked[: self.k][-1] if len(masked) >= self.k else block[-1]
        reach = kth - kth % self.window + self.window  # the end of the window with the k-th mask
        near = [p for p in masked if p < reach]
        best = sorted(near, key=lambda p: (p not in now, -memory.get(p, 0.0) * weight[p - start], p))[: self.k]
        known = [p for p in block if p not in masked and p not in last]
        known = sorted(known, key=lambda p: (-when.get(p, -1), p))[: self.k - len(best)]
        rows = {*(p - self.shift for p in best), *known, *last}
        for a, b in zip(sorted(rows), sorted(rows)[1:], strict=False):
            if b - a <= self.inflate:
                rows |= set(range(a, b))
        return sorted(rows)
