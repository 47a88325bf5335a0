"""LLaDA2.0 and 2.1: their network, every expert computed for every row, and both loops (docs/models.md)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch

from tests.reference.blocks import BlockModel, Forward, Loop, most_confident, quota

_ATTENTION = {"query_layernorm": "qnorm", "key_layernorm": "knorm", "dense": "o", "query_key_value": "qkv"}
_TOP = {"word_embeddings": "embed", "norm": "norm", "lm_head": "head"}
_REST = {"input_layernorm": "norm1", "post_attention_layernorm": "norm2"}


class DenseLlada2(BlockModel):
    """A checkpoint in LLaDA2's layout."""

    def __init__(self, directory: Any) -> None:
        super().__init__(directory)
        self.rotated = int(self.head_dim * self.config["partial_rotary_factor"])
        sizes = [n * self.head_dim for n in (self.heads, self.kv_heads, self.kv_heads)]
        for i in range(self.num_layers):
            parts = self.w.pop(f"{i}.qkv").split(sizes)
            self.w |= {f"{i}.{name}": part for name, part in zip("qkv", parts, strict=True)}

    @staticmethod
    def common_name(name: str) -> str:
        """E.g. 1.qkv, 0.gate, 1.router, 1.router.bias, 1.shared.up, 1.7.down."""
        parts = name.split(".")
        if "layers" not in parts:
            return _TOP[parts[-2]]
        i, rest = parts[2], parts[3:]
        if rest[0] == "attention":
            return f"{i}.{_ATTENTION[rest[1]]}"
        if rest[0] != "mlp":
            return f"{i}.{_REST[rest[0]]}"
        if rest[1] == "gate":
            return f"{i}.router" + (".bias" if rest[2] == "expert_bias" else "")
        place = {"experts": rest[2], "shared_experts": "shared"}.get(rest[1])
        return f"{i}.{place + '.' if place else ''}{rest[-2].removesuffix('_proj')}"

    def _rope(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        n = self.rotated
        inv = 1.0 / self.config["rope_theta"] ** (torch.arange(0, n, 2).float() / n)
        angle = positions.float().unsqueeze(1) * inv
        cos, sin = angle.cos().unsqueeze(1), angle.sin().unsqueeze(1)
        a, b = x[..., : n // 2], x[..., n // 2 : n]
        return torch.cat([a * cos - b * sin, b * cos + a * sin, x[..., n:]], -1)

    def _mlp(self, x: torch.Tensor, layer: int) -> torch.Tensor:
        if layer < self.config["first_k_dense_replace"]:
            return self._gated(x, f"{layer}.")
        logits = x @ self.w[f"{layer}.router"].T
        weight = torch.stack([self.route(row, self.w[f"{layer}.router.bias"]) for row in logits])
        outputs = [self._gated(x, f"{layer}.{e}.") for e in range(self.config["num_experts"])]
        return (torch.stack(outputs, -1) * weight.unsqueeze(1)).sum(-1) + self._gated(x, f"{layer}.shared.")

    def scores(self, logits: torch.Tensor) -> torch.Tensor:
        """[experts] logits of a row -> scores."""
        return logits.sigmoid()

    def route(self, logits: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        """[experts] logits of a row -> weights, 0 for experts that do not answer."""
        groups = self.config["n_group"]
        score = self.scores(logits)
        biased = score + bias
        members = torch.arange(len(biased)).view(groups, -1)
        value = [float(biased[m].sort().values[-2:].sum()) for m in members]
        kept = sorted(range(groups), key=lambda g: -value[g])[: self.config["topk_group"]]
        eligible = [int(e) for g in kept for e in members[g]]
        chosen = sorted(eligible, key=lambda e: -float(biased[e]))[: self.config["num_experts_per_tok"]]
        weight = torch.zeros_like(score)
        weight[chosen] = score[chosen] / (score[chosen].sum() + 1e-20) * self.config["routed_scaling_factor"]
        return weight


class _Llada2Loop(Loop):
    """What both releases have in common. They recompute all earlier blocks in every step, which changes nothing."""

    def forwards(self) -> Iterator[Forward]:
        """The denoising steps of all blocks."""
        first = self.prompt // self.length * self.length
        total = self.whole_blocks(self.prompt + self.budget)
        self.tokens += [self.mask] * (total - self.prompt)
        self.prefill()
        for start in range(first, total, self.length):
            end = start + self.length
            yield from self.block(start, end)
            if self.output or self.ended(end):
                del self.tokens[end:]
                break
            self.store(start, end)
        answer = self.tokens[self.prompt : self.prompt + self.budget]
        self.output = self.output or self.cut(answer)

    def block(self, start: int, end: int) -> Iterator[Forward]:
        """Denoise a block."""
        raise NotImplementedError

    def ended(self, end: int) -> bool:
        """Whether nothing follows the block that ends there."""
        raise NotImplementedError

    def report(self, step: int, start: int, end: int, before: list[int], **what: Any) -> Forward:
        """A denoising forward, as the released code runs it."""
        token, confidence, decidable = what.pop("token"), what.pop("confidence"), what.pop("decidable")
        return Forward(
            "denoise",
            block=start // self.length,
            rows=(0, end),
            keys=(0, end),
            tokens_in=before,
            in_block_step=step,
            confidence=[confidence[i] if i in decidable else None for i in range(start, end)],
            argmax=[token[i] for i in range(start, end)],
            **what,
        )


class Llada20Loop(_Llada2Loop):
    """LLaDA2.0's ``generate``."""

    defaults: ClassVar[dict[str, Any]] = {"minimal_topk": 1, "eos_early_stop": False}

    def block(self, start: int, end: int) -> Iterator[Forward]:
        """As many steps as the schedule has, or until no mask is left."""
        steps = min(self.settings["steps"], self.budget // self.settings["minimal_topk"])
        for k in range(steps):
            masked = self.masked(start, end)
            if not masked:
                return
            before = self.tokens[start:end]
            token, confidence = self.denoise(start, end)
            count = quota(self.length, steps, k)
            high = [i for i in masked if confidence[i] > self.settings["threshold"]]
            chosen = high if len(high) >= count else most_confident(confidence, masked, count)
            for i in chosen:
                self.tokens[i] = token[i]
            committed = [(i, token[i]) for i in chosen]
            yield self.report(
                k, start, end, before, token=token, confidence=confidence, decidable=masked, committed=committed
            )
            if self.settings["eos_early_stop"] and any(token[i] in self.eos for i in chosen):
                first = next(i for i, t in enumerate(self.tokens) if t in self.eos)
                if not self.masked(self.prompt, first):
                    self.output = self.tokens[self.prompt : first + 1]
                    return

    def ended(self, end: int) -> bool:
        """With an end token in the answer."""
        return bool(set(self.tokens[self.prompt : end]) & set(self.eos))


class Llada21Loop(_Llada2Loop):
    """LLaDA2.1's ``generate``: tokens of the block may be replaced until it is left."""

    defaults: ClassVar[dict[str, Any]] = {"eos_early_stop": False}

    def block(self, start: int, end: int) -> Iterator[Forward]:
        """Until a step changes nothing, or the steps without masks are used up."""
        step = quiet = 0
        while True:
            masked = self.masked(start, end)
            if not masked:
                quiet += 1
                if quiet > self.settings["max_post_steps"]:
                    return
            before = self.tokens[start:end]
            token, confidence = self.denoise(start, end)
            drafted = self.draft(masked, confidence)
            editable = self.editable(start, end, masked)
            edits = [i for i in editable if confidence[i] > self.settings["editing_threshold"]]
            edited = [(i, self.tokens[i], token[i]) for i in edits if token[i] != self.tokens[i]]
            for i in [*drafted, *(i for i, _, _ in edited)]:
                self.tokens[i] = token[i]
            yield self.report(
                step, start, end, before, token=token, confidence=confidence, decidable=[*masked, *editable],
                committed=[(i, token[i]) for i in drafted], edited=edited,
            )  # fmt: skip
            step += 1
            if not masked and not edited:
                return

    def draft(self, masked: list[int], confidence: dict[int, float]) -> list[int]:
        """Masks to fill."""
        high = [i for i in masked if confidence[i] > self.settings["threshold"]]
        count = self.settings["num_to_transfer"]
        return high if len(high) >= count else most_confident(confidence, masked, count)

    def editable(self, start: int, end: int, masked: list[int]) -> list[int]:
        """Tokens of the block that may be replaced: those of the answer."""
        return [i for i in range(max(start, self.prompt), end) if i not in masked]

    def ended(self, end: int) -> bool:
        """With an end token in the answer, if that is asked for."""
        return self.settings["eos_early_stop"] and bool(set(self.tokens[self.prompt : end]) & set(self.eos))
