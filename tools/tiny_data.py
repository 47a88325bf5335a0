"""Batches for training the tiny checkpoints, and which slots of them are masked.

The objective is that of LLaDA's supervised finetuning: the prompt is never masked, the response (answer, then
<|endoftext|> up to the canvas length) is, and the loss is a mean over the row's masked slots. Half of the rows are
masked as LLaDA masks them, k ~ U{1..G} slots anywhere, stratified over the batch: the lower-variance form of ratio
t ~ U(0,1) with weight 1/t. The other half is masked as decoding meets it: everything right of a place, but for a few
slots. Small models learn a carried state far sooner from these, as the slot before the first masked one is known.
End tokens after the first count a tenth: they are many and easy.
"""

from __future__ import annotations

import collections
import random
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from tiny_model import Batch, Family, TinyLM
from tiny_tasks import CANVASES, Problem, train_problem

# A canvas length's problems are cut into parts by prompt length, and each part is shuffled: several kinds in each
# batch, for some padding.
PARTS = 6
EARLY = 0.12
"""The share of training without long prompts and long canvases."""


@dataclass(frozen=True)
class Source:
    """What a run draws its batches from."""

    tokenizer: Tokenizer
    family: Family
    tokens: int  # positions in a batch
    curriculum: bool  # short problems first


def training_canvas(problem: Problem, progress: float, rng: random.Random) -> int:
    """The problem's own canvas; one problem in five gets the next longer one, late in training one in a hundred 256."""
    sizes = (*CANVASES, 256)
    index, roll = sizes.index(problem.canvas), rng.random()
    if progress > 0.5 and roll < 0.01:
        return sizes[-1]
    return sizes[min(index + 1, len(sizes) - 2)] if roll < 0.2 else problem.canvas


def pool(source: Source, seed: str, progress: float, size: int = 4000) -> list[Any]:
    """A shuffled pool of batches of about `tokens` positions each, similar shapes together."""
    rng, tokenizer = random.Random(seed), source.tokenizer
    problems = [train_problem(rng) for _ in range(size)]
    if source.curriculum and progress < EARLY:
        problems = [p for p in problems if p.canvas <= 48 and len(p.prompt) <= 60]
    prompts = tokenizer.encode_batch([source.family.chat(p.prompt) for p in problems], add_special_tokens=False)
    answers = tokenizer.encode_batch([p.answer for p in problems], add_special_tokens=False)
    groups = collections.defaultdict(list)
    for problem, prompt, answer in zip(problems, prompts, answers, strict=True):
        groups[training_canvas(problem, progress, rng)].append((prompt.ids, answer.ids))
    batches = []
    for canvas, rows in groups.items():
        rows.sort(key=lambda row: len(row[0]))
        part = -(-len(rows) // PARTS)
        rows = [
            row for i in range(0, len(rows), part) for row in rng.sample(rows[i : i + part], len(rows[i : i + part]))
        ]
        while rows:
            longest = max(len(prompt) for prompt, _ in rows[:24])
            count = max(4, source.tokens // (longest + canvas))
            batches.append(source.family.collate(rows[:count], canvas, tokenizer.token_to_id(source.family.eos)))
            rows = rows[count:]
    rng.shuffle(batches)
    return batches


def masked_slots(response: Tensor, ends: Tensor, generator: torch.Generator) -> Tensor:
    """Which slots (B,G) are masked: in even rows any, in odd rows most right of a place in the answer."""
    rows, canvas = response.shape
    ratio = (torch.arange(rows) + torch.rand(1, generator=generator)) / rows
    ratio = ratio[torch.randperm(rows, generator=generator)]
    noise = torch.rand(rows, canvas, generator=generator)
    anywhere = noise.argsort(1).argsort(1) < ((ratio * canvas).long() + 1)[:, None]
    place = (ratio * (ends + 1)).long()[:, None]
    known_beyond = 0.3 * torch.rand(rows, 1, generator=generator) ** 2
    slots = torch.arange(canvas)
    right = (slots == place) | ((slots > place) & (noise >= known_beyond))
    return torch.where((torch.arange(rows) % 2 == 0)[:, None], anywhere, right)


def masked_loss(model: TinyLM, batch: Batch, eos: int, mask_id: int, generator: torch.Generator) -> Tensor:
    """Mean over the rows of the weighted mean cross entropy over the row's masked response slots."""
    canvas = batch.canvas
    response = batch.ids[:, -canvas:]
    ends = (response != eos).sum(1)
    chosen = masked_slots(response, ends, generator)
    masked = F.pad(chosen, (batch.ids.shape[1] - canvas, 0))
    weight = torch.where(torch.arange(canvas) <= ends[:, None], 1.0, 0.1) * chosen
    weight = (weight / (weight.sum(1, keepdim=True) * len(batch.ids)))[chosen]
    with torch.autocast("cpu", torch.bfloat16):
        read = masked.roll(-model.config.shift, 1)
        logits = model.logits(model.hidden(batch.ids.masked_fill(masked, mask_id), batch.keys, read))
    return (F.cross_entropy(logits.float(), batch.ids[masked], reduction="none") * weight).sum()
