"""Nucleus and top-k filters on rows of logits."""

from __future__ import annotations

import torch

from vllm_d2cache.ops.dispatch import dispatched


@dispatched("vllm_d2cache.ops.triton.row_filter")
def filter_logits(logits: torch.Tensor, top_p: torch.Tensor, top_k: torch.Tensor, mask_token_id: int) -> None:
    """Nucleus, then top-k: the smallest head of the sorted vocabulary whose mass first exceeds top_p is kept.

    What is not kept is set to the lowest number of fp32, in place. A token that may be chosen is kept in any case: the
    second one if the first is the mask.

    Args:
        logits: [m, vocab] float32; written.
        top_p: [m] float32, 1 = off.
        top_k: [m] int64, 0 = off.
        mask_token_id: never chosen, though it keeps its share of the softmax.
    """
    ordered, index = logits.sort(dim=-1, descending=True, stable=True)
    before = torch.softmax(ordered, dim=-1).cumsum(-1).roll(1, dims=-1)
    before[:, 0] = 0.0
    rank = torch.arange(logits.shape[1], device=logits.device)
    keep = (before <= top_p.unsqueeze(1)) | (top_p.unsqueeze(1) >= 1.0)
    keep &= (rank < top_k.unsqueeze(1)) | (top_k.unsqueeze(1) <= 0)
    keep[:, 0] = True
    keep[:, 1] |= index[:, 0] == mask_token_id
    logits.masked_fill_(~torch.empty_like(keep).scatter_(1, index, keep), torch.finfo(logits.dtype).min)
