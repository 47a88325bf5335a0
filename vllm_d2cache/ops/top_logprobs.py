"""Log-probabilities of chosen tokens and of the likeliest alternatives, a tile of rows at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch

from vllm_d2cache.ops.row_stats import ROWS_PER_TILE


def top_logprobs(
    hidden: torch.Tensor, lm_head: Callable[[torch.Tensor], torch.Tensor], token: torch.Tensor, k: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What vLLM's sampler reports of a sampled token, in fp32, from the model's own distribution at temperature 1.

    Equal logits are ordered by token id, so that the first j alternatives are the same for every k >= j.

    Args:
        hidden: [n, d] final hidden states.
        lm_head: maps [m, d] to [m, vocab] logits.
        token: [n] int64, the chosen tokens.
        k: alternatives; at most the vocabulary.

    Returns:
        token ids [n, k + 1] int64 and log-probabilities [n, k + 1] float32, the chosen token first, then the k
        likeliest; and the chosen token's rank [n] int64, the number of tokens at least as likely.
    """
    ids = torch.empty(hidden.shape[0], k + 1, dtype=torch.int64, device=hidden.device)
    logprobs = torch.empty(hidden.shape[0], k + 1, device=hidden.device)
    rank = torch.empty(hidden.shape[0], dtype=torch.int64, device=hidden.device)
    for i in range(0, hidden.shape[0], ROWS_PER_TILE):
        j = min(i + ROWS_PER_TILE, hidden.shape[0])
        logits = lm_head(hidden[i:j]).float()
        ids[i:j, 0] = token[i:j]
        ids[i:j, 1:] = _top_ids(logits, k)
        total = logits.logsumexp(-1, keepdim=True)
        logprobs[i:j] = logits.gather(1, ids[i:j]) - total
        rank[i:j] = (logits >= logits.gather(1, ids[i:j, :1])).sum(-1)
    return ids, logprobs, rank


def _top_ids(logits: torch.Tensor, k: int) -> torch.Tensor:
    """[m, k] int64: ids of the largest logits in descending order, the lower id first among equals."""
    bits = (logits + 0.0).view(torch.int32)  # + 0.0 turns -0 into 0, which is equal to it
    # The bit pattern of a float, with those of negative numbers turned round, orders as the float does.
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    descending_id = logits.shape[1] - 1 - torch.arange(logits.shape[1], device=logits.device)
    key = (ordered.long() << 32) | descending_id
    return key.topk(k, dim=-1).indices
