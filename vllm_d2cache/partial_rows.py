"""Which rows of a step the layers need not compute, for requests whose policy stores outputs or drops rows.

Costs nothing where there is no such request; else waits for the device, for the numbers that shapes depend on.
"""

from __future__ import annotations

from itertools import accumulate

import torch

from vllm_d2cache.canvas import CanvasStates, Request
from vllm_d2cache.policies import POLICY_CLASSES
from vllm_d2cache.records import CanvasView, ExitingRows, StoredRows


def stored_rows(
    canvas: CanvasStates,
    view: CanvasView,
    requests: list[Request],
    counts: list[int],
    request: torch.Tensor,
    positions: torch.Tensor,
) -> StoredRows | None:
    """StepRows.stored.

    Args:
        counts: rows of each request.
        request: [N] int64, row of the batch each belongs to.
        positions: [N] int64.
    """
    storing = [r for r, q in enumerate(requests) if POLICY_CLASSES[q.options.policy].stores_outputs]
    if not storing:
        return None
    stores = torch.zeros(len(requests), dtype=torch.bool, device=canvas.device)
    stores[storing] = True
    kind = canvas.stored[view.slots[request], positions] * stores[request]
    count = canvas.stored_count[view.slots]
    computed, compared = torch.zeros(2, len(requests), 1, dtype=torch.int64, device=canvas.device)
    computed.index_add_(0, request, (kind == 0).long().unsqueeze(1))
    compared.index_add_(0, request, (kind == 2).long().unsqueeze(1))
    index = (kind == 2).nonzero().flatten()
    proxied = None
    if any(POLICY_CLASSES[requests[r].options.policy].compares_proxies for r in storing):
        rank = canvas.proxy_rank[view.slots[request[index]]]
        some = rank.nonzero().flatten()
        proxied = (some, rank[some])
    return StoredRows(
        stored=kind > 0,
        compared=index,
        request=request,
        count=count,
        computed=(computed + torch.minimum(compared, count)).t().tolist(),
        proxied=proxied,
        kept=_canvas_rows(view, storing, counts, request, positions),
        capacity={r: requests[r].canvas_len + 1 for r in storing},
    )


def exiting_rows(
    canvas: CanvasStates,
    view: CanvasView,
    requests: list[Request],
    counts: list[int],
    request: torch.Tensor,
    positions: torch.Tensor,
) -> ExitingRows | None:
    """StepRows.exiting; arguments as above."""
    dropping = [r for r, q in enumerate(requests) if POLICY_CLASSES[q.options.policy].drops_rows]
    if not dropping:
        return None
    remembered = _canvas_rows(view, dropping, counts, request, positions)
    keep = dict(zip(dropping, canvas.exit_keep[view.slots][dropping].tolist(), strict=True))
    left = {r: len(remembered[r][0]) for r in dropping}
    staying, exits = [counts], []
    for layer in range(canvas.traits.num_layers):
        here = {r: min(left[r], keep[r][layer]) for r in dropping if keep[r][layer] >= 0}
        behind = list(staying[-1])
        for r, stay in here.items():
            behind[r] -= left[r] - stay
            left[r] = stay
        staying.append(behind)
        exits.append(here)
    return ExitingRows(
        staying=staying[1:],
        exits=exits,
        remembered=remembered,
        capacity={r: requests[r].canvas_len + 1 for r in dropping},
        request=request,
        bias=canvas.exit_bias[view.slots[request], positions],
        weight=canvas.exit_weight[view.slots[request]],
    )


def _canvas_rows(
    view: CanvasView, chosen: list[int], counts: list[int], request: torch.Tensor, positions: torch.Tensor
) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    """Of some requests, the rows [n] int64 from the position before the canvas on, and their places, that one's first.

    A shifted family reads its first slot from the position before the canvas.
    """
    place = positions - view.prompt_len[request] + 1
    sizes = torch.zeros_like(view.prompt_len).index_add_(0, request, (place >= 0).long()).tolist()
    ends = list(accumulate(counts))
    rows = {r: torch.arange(ends[r] - sizes[r], ends[r], device=positions.device) for r in chosen}
    return {r: (mine, place[mine]) for r, mine in rows.items()}
