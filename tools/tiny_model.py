"""The tiny models: a bidirectional llama-type transformer, full-recompute decoding and exact-match evaluation.

Plain PyTorch, for all families; what they differ in is a `Family` (tiny_llada.py, tiny_dream.py, tiny_sdar.py). The
decoding here is the plain one (whole canvas, one token a step, everything recomputed), which a serving engine can be
compared with; tiny_blocks.py has that of a text in blocks.
"""

from __future__ import annotations

import collections
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn

from tiny_tasks import Problem


@dataclass(frozen=True)
class Config:
    """Sizes of the model (LLaDA's names), and the two things in which Dream differs."""

    vocab_size: int = 320
    d_model: int = 192
    n_layers: int = 4
    n_heads: int = 6
    mlp_hidden_size: int = 512
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5
    qkv_bias: bool = False
    qk_norm: bool = False  # an RMS norm over each head of q and k, before RoPE
    shift: int = 0  # a slot is predicted at the position this far to its left
    block: int = 0  # positions in a block of a block-causal model; 0: bidirectional


@dataclass(frozen=True)
class Family:
    """What the training script and the evaluation must know of a model family."""

    name: str
    mask: str
    eos: str
    config: Config
    build_tokenizer: Callable[[], Tokenizer]
    chat: Callable[[str], str]  # user message -> prompt text with the generation prompt
    tensor_name: Callable[[str], str]  # of `TinyLM.state_dict` -> of the checkpoint
    files: Callable[[Config, Tokenizer], dict[str, Any]]  # JSON files of the checkpoint, but for the weights
    save_tokenizer: Callable[[Tokenizer, Path], None]
    load_tokenizer: Callable[[Path], Tokenizer]
    collate: Callable[..., Any]  # (rows, canvas, EOS) -> a batch
    loss: Callable[..., Tensor]  # (model, batch, EOS, mask, generator) -> scalar
    decode: Callable[..., Tensor]  # (model, batch, mask, sigma) -> responses (B,G)
    sigmas: tuple[float, ...] = (0.0, 10.0)  # of the certainty prior, in tables


class Block(nn.Module):
    """One llama-type block without causal mask."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        width, hidden = config.d_model, config.mlp_hidden_size
        self.heads = config.n_heads
        self.attn_norm = nn.RMSNorm(width, eps=config.rms_norm_eps)
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, width, bias=config.qkv_bias) for _ in range(3))
        size = width // config.n_heads
        self.q_norm, self.k_norm = (
            nn.RMSNorm(size, eps=config.rms_norm_eps) if config.qk_norm else nn.Identity() for _ in range(2)
        )
        self.attn_out = nn.Linear(width, width, bias=False)
        self.ff_norm = nn.RMSNorm(width, eps=config.rms_norm_eps)
        self.ff_proj, self.up_proj = (nn.Linear(width, hidden, bias=False) for _ in range(2))
        self.ff_out = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, keys: Tensor | None, wanted: Tensor | None = None) -> Tensor:
        """x (B,T,d), cos/sin (T or B,1,T; head size), keys as in `TinyLM.hidden` -> (B,T,d), or `wanted` rows (N,d)."""
        y = self.attn_norm(x)
        q, k, v = (
            proj(y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = self.q_norm(q), self.k_norm(k)
        # Spelt out: with PyTorch's fused attention a training step takes 1.7 times as long (64 sequences of 64,
        # bfloat16, one core of an AMD EPYC, torch 2.13).
        scores = (rotate(q, cos, sin) * q.shape[-1] ** -0.5) @ rotate(k, cos, sin).mT
        if keys is not None:
            scores = scores.masked_fill(~keys, -1e9)
        out = scores.softmax(-1).to(v.dtype) @ v
        out = out.transpose(1, 2).flatten(2)
        x = x + self.attn_out(out) if wanted is None else x[wanted] + self.attn_out(out[wanted])
        y = self.ff_norm(x)
        return x + self.ff_out(F.silu(self.ff_proj(y)) * self.up_proj(y))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Half-split RoPE on (B,H,T,head size)."""
    low, high = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-high, low), dim=-1) * sin


class TinyLM(nn.Module):
    """The model; `state_dict` names follow LLaDA without the leading "model."."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.vocab_size, config.d_model),
                "blocks": nn.ModuleList(Block(config) for _ in range(config.n_layers)),
                "ln_f": nn.RMSNorm(config.d_model, eps=config.rms_norm_eps),
                "ff_out": nn.Linear(config.d_model, config.vocab_size, bias=False),
            }
        )
        for name, weight in self.named_parameters():
            if weight.ndim == 2:
                std = 0.5 * weight.shape[1] ** -0.5
                nn.init.normal_(weight, std=std / config.n_layers**0.5 if "out" in name else std)
            elif name.endswith("bias"):
                nn.init.zeros_(weight)

    def angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine (..., head size) of RoPE at `positions` (...)."""
        size = self.config.d_model // self.config.n_heads
        freq = self.config.rope_theta ** (-torch.arange(0, size, 2, dtype=torch.float32) / size)
        angle = positions.float()[..., None] * freq.repeat(2)
        return angle.cos(), angle.sin()

    def hidden(
        self, ids: Tensor, keys: Tensor | None = None, wanted: Tensor | None = None, positions: Tensor | None = None
    ) -> Tensor:
        """Token ids (B,T), flags of the keys a row sees (B,1,1 or T,T) or None -> final normed hidden states (B,T,d).

        `wanted` (B,T) bool: only of these rows, (N,d). `positions` (B,1,T): where the tokens stand, if not in order.
        """
        places = torch.arange(ids.shape[1]) if positions is None else positions
        (cos, sin), x = self.angles(places), self.transformer["wte"](ids)
        *blocks, last = self.transformer["blocks"]
        for block in blocks:
            x = block(x, cos, sin, keys)
        x = last(x, cos, sin, keys, wanted)
        return self.transformer["ln_f"](x)

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states (...,d) -> logits (...,V)."""
        return self.transformer["ff_out"](hidden)

    def response_logits(self, ids: Tensor, keys: Tensor | None, canvas: int) -> Tensor:
        """Logits (B,G,V) of the last `canvas` slots, read where the family reads them."""
        end = ids.shape[1] - self.config.shift
        return self.logits(self.hidden(ids, keys)[:, end - canvas : end])


@dataclass
class Batch:
    """`ids` (B,P+G) long, `keys` (B,1,1,P+G) bool (None without padding), `canvas` G."""

    ids: Tensor
    keys: Tensor | None
    canvas: int


def collate(rows: list[tuple[list[int], list[int]]], canvas: int, eos: int) -> Batch:
    """(prompt ids, answer ids) pairs -> one batch; prompts are padded on the left, responses with EOS."""
    width = max(len(prompt) for prompt, _ in rows)
    ids = torch.full((len(rows), width + canvas), eos)
    keys = torch.ones((len(rows), 1, 1, width + canvas), dtype=torch.bool)
    for row, (prompt, answer) in enumerate(rows):
        pad = width - len(prompt)
        ids[row, pad:width] = torch.tensor(prompt)
        ids[row, width : width + len(answer)] = torch.tensor(answer)
        keys[row, ..., :pad] = False
    return Batch(ids, None if keys.all() else keys, canvas)


def density(known: Tensor, sigma: float) -> Tensor:
    """Certainty density (B,G) of known flags (B,G): known text on the left, the last flag on the right."""
    size = known.shape[1]
    span = torch.arange(-3 * size, 3 * size, dtype=torch.float64)
    norm = torch.exp(-(span**2) / (2 * sigma**2)).sum().clamp(min=1e-8)
    offset = torch.arange(size)[:, None] - torch.arange(-size, 2 * size)
    kernel = torch.exp(-(offset.double() ** 2) / (2 * sigma**2)) / norm
    flags = known.double()
    extended = torch.cat((torch.ones_like(flags), flags, flags[:, -1:].expand_as(flags)), dim=1)
    return (extended @ kernel.T).float()


@torch.inference_mode()
def decode(model: TinyLM, batch: Batch, mask_id: int, sigma: float) -> Tensor:
    """Greedy decoding of the whole canvas with full recompute, one token a step -> responses (B,G)."""
    ids, canvas = batch.ids.clone(), batch.canvas
    ids[:, -canvas:] = mask_id
    rows = torch.arange(len(ids))
    for _ in range(canvas):
        response = ids[:, -canvas:]
        probs = model.response_logits(ids, batch.keys, canvas).softmax(-1)
        score, token = probs.max(-1)
        masked = response == mask_id
        if sigma > 0:
            score = score * density(~masked, sigma)
        slot = score.masked_fill(~masked, -1.0).argmax(1)
        response[rows, slot] = token[rows, slot]
    return ids[:, -canvas:]


def evaluate(
    model: TinyLM, tokenizer: Tokenizer, family: Family, problems: list[Problem], sigma: float
) -> dict[str, float]:
    """Exact-match accuracy per kind and overall ("all"), each problem at its own canvas."""
    eos, mask_id = tokenizer.token_to_id(family.eos), tokenizer.token_to_id(family.mask)
    prompts = {p: tokenizer.encode(family.chat(p.prompt), add_special_tokens=False).ids for p in problems}
    groups = collections.defaultdict(list)
    for problem in sorted(problems, key=lambda p: len(prompts[p])):
        groups[problem.canvas].append(problem)
    right: dict[str, list[bool]] = collections.defaultdict(list)
    for canvas, group in groups.items():
        for start in range(0, len(group), 64):
            part = group[start : start + 64]
            out = family.decode(model, family.collate([(prompts[p], []) for p in part], canvas, eos), mask_id, sigma)
            for problem, ids in zip(part, out.tolist(), strict=True):
                text = tokenizer.decode(ids[: ids.index(eos)] if eos in ids else ids)
                right[problem.kind].append(text == problem.answer)
                right["all"].append(text == problem.answer)
    kinds = dict.fromkeys(problem.kind for problem in problems)
    return {kind: sum(right[kind]) / len(right[kind]) for kind in (*kinds, "all")}
