"""Fast-dLLM v2: Qwen2.5 with rows that see their block, and ``batch_sample`` for one request (docs/models.md)."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from tests.reference.blocks import BlockModel, Forward, Loop, best, most_confident
from tests.reference.dream import DenseDream

PAD = 371  # of the checkpoint's generation_config.json


class DenseFastDllmV2(BlockModel):
    """A checkpoint in the layout of Qwen2.5, whose names Dream has, too."""

    common_name = staticmethod(DenseDream.common_name)


class FastDllmV2Loop(Loop):
    """A position's token is read one row to its left; a block's first one comes from the forward that stores the last.

    Settings: block_length, small_block_length, threshold, max_new_tokens, use_block_cache.
    """

    ended = False

    @property
    def budget(self) -> int:
        """Most new tokens."""
        return self.settings["max_new_tokens"]

    def forwards(self) -> Iterator[Forward]:
        """A prefill, and for each block its denoising steps and the forward that stores it."""
        start = self.prompt // self.length * self.length
        logits = self.prefill() if self.prompt > self.length else None
        if logits is not None:
            committed = self.next_token(logits) if self.prompt == start else []
            yield Forward("prefill", start // self.length - 1, (0, start), (0, start), committed=committed)
        for block in range(self.budget // self.length):
            yield from self.block(start + block * self.length)
            if self.ended:
                break
        self.output = self.tokens[self.prompt :]

    def next_token(self, logits: torch.Tensor) -> list[tuple[int, int]]:
        """Append what the last row predicts."""
        self.tokens.append(int(logits[-1].argmax()))
        return [(len(self.tokens) - 1, self.tokens[-1])]

    def block(self, start: int) -> Iterator[Forward]:
        """Sub-block by sub-block; then the block is stored, unless the request ends in it."""
        end, width = start + self.length, self.settings["small_block_length"]
        self.tokens += [self.mask] * (end - len(self.tokens))
        stops: list[int] = []
        step, cached = 0, False
        for left in range(start, end, width):
            right = left + width
            while masked := self.masked(left, right):
                whole = not self.settings["use_block_cache"] or not cached or self.tokens[left] == self.mask
                cached = True
                forward = self.denoised(start if whole else left, end if whole else right, end, masked)
                forward.block, forward.sub_block = start // self.length, (left - start) // width
                forward.in_block_step = step
                stops += [i for i, token in forward.committed if token in self.eos]
                step += 1
                yield forward
        if stops:
            self.end_request()
            return
        logits = self.store(start, end)
        yield Forward("commit", start // self.length, (start, end), (0, end), committed=self.next_token(logits))

    def denoised(self, first: int, last: int, end: int, masked: list[int]) -> Forward:
        """A forward over rows ``first`` to ``last`` that fills some of ``masked``; the first reads its own logits."""
        before = self.tokens[first:last]
        logits = self.model.rows(before, first, end)
        token, confidence = best(self.shifted(logits), first)
        high = [i for i in masked if confidence[i] > self.settings["threshold"]]
        chosen = sorted({*high, *most_confident(confidence, masked, 1)})
        decidable = self.masked(first, last)
        for i in chosen:
            self.tokens[i] = token[i]
        return Forward(
            "denoise",
            0,
            (first, last),
            (0, end),
            before,
            committed=[(i, token[i]) for i in chosen],
            confidence=[confidence[i] if i in decidable else None for i in range(first, last)],
            argmax=[token[i] for i in range(first, last)],
        )

    def shifted(self, logits: torch.Tensor) -> torch.Tensor:
        """[n, vocab] by the position that a row fills."""
        return torch.cat([logits[:1], logits[:-1]])

    def end_request(self) -> None:
        """What follows the first end token of the answer becomes the pad token."""
        first = next(i for i in range(self.prompt, len(self.tokens)) if self.tokens[i] in self.eos)
        self.tokens[first + 1 :] = [PAD] * (len(self.tokens) - first - 1)
        self.ended = True
