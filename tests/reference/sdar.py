"""SDAR and TraDo: Qwen3 with rows that see their block, and the loop of the authors' evaluation (docs/models.md)."""

from __future__ import annotations

from collections.abc import Iterator

from tests.reference.blocks import BlockModel, Forward, Loop, most_confident, quota
from tests.reference.dream import DenseDream

_NORMS = {"q_norm": "qnorm", "k_norm": "knorm"}


class DenseSdar(BlockModel):
    """A checkpoint in SDAR's layout."""

    @staticmethod
    def common_name(name: str) -> str:
        """As Dream's, but for the norms of q and k."""
        *path, module, _ = name.split(".")
        if module in _NORMS:
            return f"{path[2]}.{_NORMS[module]}"
        return DenseDream.common_name(name)


class SdarLoop(Loop):
    """Settings as published: strategy, threshold, denoising_steps, gen_length, block_length.

    ``loop`` "generate.py" takes confidences behind a top-k of one, as the released generate.py does: all are 1.
    """

    def forwards(self) -> Iterator[Forward]:
        """A prefill, and for each block its denoising steps and a forward that stores it."""
        first = self.prompt // self.length * self.length
        total = self.whole_blocks(self.prompt + self.budget)
        self.tokens += [self.mask] * (total - self.prompt)
        if self.prefill() is not None:
            yield Forward("prefill", first // self.length - 1, (0, first), (0, first))
        for start in range(first, total, self.length):
            yield from self.block(start, start + self.length)
            if set(self.tokens[self.prompt :]) & set(self.eos):
                break
        self.output = self.tokens[self.prompt :]

    def block(self, start: int, end: int) -> Iterator[Forward]:
        """Until no mask is left; then the forward that stores it."""
        here = {"block": start // self.length, "rows": (start, end), "keys": (0, end)}
        steps = self.settings["denoising_steps"]
        for k in range(steps):
            masked = self.masked(start, end)
            if not masked:
                break
            before = self.tokens[start:end]
            token, confidence = self.denoise(start, end)
            judged = dict.fromkeys(confidence, 1.0) if self.settings["loop"] == "generate.py" else confidence
            chosen = self.choose(masked, judged, quota(self.length, steps, k))
            for i in chosen:
                self.tokens[i] = token[i]
            yield Forward(
                "denoise",
                **here,
                tokens_in=before,
                in_block_step=k,
                committed=[(i, token[i]) for i in chosen],
                confidence=[confidence[i] if i in masked else None for i in range(start, end)],
                argmax=[token[i] for i in range(start, end)],
            )
        assert not self.masked(start, end)
        self.store(start, end)
        yield Forward("commit", **here)

    def choose(self, masked: list[int], confidence: dict[int, float], count: int) -> list[int]:
        """Positions to commit."""
        strategy = self.settings["strategy"]
        if strategy == "sequential":
            return masked[:count]
        high = [i for i in masked if confidence[i] > self.settings["threshold"]]
        if strategy == "low_confidence_dynamic" and len(high) >= count:
            return high
        return most_confident(confidence, masked, count)
