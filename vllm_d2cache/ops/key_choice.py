"""Which keys a layer keeps: scores under a mean query, and the best of them after pooling.

docs/methods/other-caches.md, section 2.
"""

from __future__ import annotations

import torch


def mean_query_scores(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """The mean over heads of the mean query's product with each key: signed, without scale or softmax.

    Args:
        query: [n, heads, head size].
        key: [kv heads, T, head size].

    Returns:
        [T] float32.
    """
    heads, kv_heads = query.shape[1], key.shape[0]
    mean = query.float().mean(0).view(kv_heads, heads // kv_heads, -1).sum(1) / heads
    return torch.bmm(key.float(), mean.unsqueeze(2)).sum(0).squeeze(1)


def choose_keys(scores: torch.Tensor, count: int, pool: int) -> torch.Tensor:
    """The ``count`` best places of a row of scores, each as good as the best within the ``pool`` places around it.

    Args:
        scores: [n] float32.
        pool: width of the neighbourhood, centred; an even one reaches one place farther to the right.

    Returns:
        [count] int64, ascending. Ties go to the lower place.
    """
    n = scores.shape[0]
    if count >= n:
        return torch.arange(n, device=scores.device)
    width = min(pool, 2 * n + 1)
    padded = torch.nn.functional.pad(scores, ((width - 1) // 2, width // 2), value=-torch.inf)
    pooled = torch.nn.functional.max_pool1d(padded.view(1, 1, -1), width, stride=1).view(-1)
    return pooled.argsort(descending=True, stable=True)[:count].sort().values
