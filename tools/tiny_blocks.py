"""Training and decoding of the tiny block-causal model: a row sees its own block of positions and those before it.

Blocks are counted from the first position of the prompt, as the released loops count them, so the prompt's end may
share a block with the response's beginning. A text ends with the block of its end token; nothing stands behind it.

In training every block is denoised at once: the sequence is followed by a second, partly masked copy of its response's
blocks at the same positions, whose rows see the clean blocks before theirs and their own masked block (the vectorised
training of Arriola et al., "Block Diffusion", section 3.2 and appendix B.6).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from tiny_model import TinyLM


@dataclass
class Blocks:
    """A batch of texts in blocks, padded on the right.

    Attributes:
        ids: clean texts (B,L) long; EOS behind their ends.
        prompts: lengths of the prompts (B,).
        lengths: lengths of the texts (B,), whole blocks.
        canvas: longest response that is asked for.
    """

    ids: Tensor
    prompts: Tensor
    lengths: Tensor
    canvas: int


def collate(rows: list[tuple[list[int], list[int]]], canvas: int, eos: int, block: int) -> Blocks:
    """(prompt ids, answer ids) pairs -> one batch; a text reaches to the end of the block of its first EOS."""
    prompts = torch.tensor([len(prompt) for prompt, _ in rows])
    ends = prompts + torch.tensor([len(answer) + 1 for _, answer in rows])
    lengths = -(-ends // block) * block
    width = -(-int((prompts + canvas).max()) // block) * block
    ids = torch.full((len(rows), max(width, int(lengths.max()))), eos)
    for row, (prompt, answer) in enumerate(rows):
        ids[row, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
    return Blocks(ids, prompts, lengths, canvas)


def masked_slots(positions: Tensor, prompts: Tensor, block: int, generator: torch.Generator) -> Tensor:
    """Which of the response `positions` (B,N) are masked: 1..block of each block; in odd rows those on its right."""
    slots, texts = positions.shape[1] // block, len(positions)
    kept = torch.randint(0, block, (texts, slots, 1), generator=generator)
    noise = torch.rand(texts, slots, block, generator=generator)
    anywhere, even = noise.argsort(-1).argsort(-1), (torch.arange(texts) % 2 == 0)[:, None, None]
    place = torch.where(even, anywhere, torch.arange(block))
    return (place >= kept).flatten(1) & (positions >= prompts[:, None])


def visible(positions: Tensor, clean: Tensor, real: Tensor, block: int) -> Tensor:
    """Which keys a row sees, (B,1,T,T) bool, of `positions` (B,T), `clean` (T) and `real` (B,T) flags."""
    number = positions // block
    query, key = number[:, :, None], number[:, None, :]
    before = clean[None, :] & (key < query)
    own = (clean[:, None] == clean[None, :]) & (key == query)
    return ((before | own) & real[:, None, :])[:, None]


def masked_loss(model: TinyLM, batch: Blocks, eos: int, mask_id: int, generator: torch.Generator, block: int) -> Tensor:
    """Mean over the rows of the mean cross entropy over their masked slots."""
    starts = batch.prompts // block * block
    span = int((batch.lengths - starts).max())
    width = int(batch.lengths.max())
    second = starts[:, None] + torch.arange(span)
    positions = torch.cat((torch.arange(width).expand(len(starts), -1), second), 1)
    real = positions < batch.lengths[:, None]
    ids = batch.ids.gather(1, positions.clamp(max=batch.ids.shape[1] - 1))
    masked = F.pad(masked_slots(second, batch.prompts, block, generator), (width, 0)) & real
    keys = visible(positions, torch.arange(width + span) < width, real, block)
    weight = masked / (masked.sum(1, keepdim=True).clamp(min=1) * len(ids))
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model.hidden(ids.masked_fill(masked, mask_id), keys, masked, positions[:, None])
        logits = model.logits(hidden)
    return (F.cross_entropy(logits.float(), ids[masked], reduction="none") * weight[masked]).sum()


@torch.inference_mode()
def decode(model: TinyLM, batch: Blocks, mask_id: int, sigma: float, block: int) -> Tensor:
    """Greedy decoding block by block, the surest slot of a block a step -> responses (B,G). `sigma` must be 0."""
    assert sigma == 0, "a certainty prior is not defined inside a block here"
    width = batch.ids.shape[1]
    order = torch.arange(width)
    ids = torch.where(order >= batch.prompts[:, None], mask_id, batch.ids)
    keys = ((order // block)[None, :] <= (order // block)[:, None])[None, None]
    for number in range(-(-batch.canvas // block) + 1):
        spots = (batch.prompts // block * block + number * block)[:, None] + torch.arange(block)
        spots = spots.clamp(max=width - 1)
        last = int(spots.max()) + 1
        for _ in range(block):
            hidden = model.hidden(ids[:, :last], keys[..., :last, :last])
            probs = model.logits(hidden.gather(1, spots[..., None].expand(-1, -1, hidden.shape[-1]))).softmax(-1)
            score, token = probs.max(-1)
            known = ids.gather(1, spots)
            slot = score.masked_fill(known != mask_id, -1.0).argmax(1, keepdim=True)
            chosen = torch.where(known.gather(1, slot) == mask_id, token.gather(1, slot), known.gather(1, slot))
            ids.scatter_(1, spots.gather(1, slot), chosen)
    return ids.gather(1, (batch.prompts[:, None] + torch.arange(batch.canvas)).clamp(max=width - 1))


def of_length(block: int) -> tuple[partial[Blocks], partial[Tensor], partial[Tensor]]:
    """`collate`, `masked_loss` and `decode` for blocks of this many positions."""
    return partial(collate, block=block), partial(masked_loss, block=block), partial(decode, block=block)
