"""SPA-Cache: dLLM-Cache with fresh K, rows compared by a few leading directions, and a budget for each layer.

docs/methods/other-caches.md, section 4, and the exact cheaper forms of section 5.
"""

from __future__ import annotations

from collections import defaultdict
from typing import ClassVar, NamedTuple

import torch

from vllm_d2cache.canvas.view import CanvasView
from vllm_d2cache.mechanisms.stored_outputs import StoresOutputs
from vllm_d2cache.mechanisms.value_directions import MOST_DIRECTIONS
from vllm_d2cache.options.types import Choice, Number
from vllm_d2cache.policies.dllm_cache import DLLMCachePolicy

GAUSSIAN, UNIFORM = DISTRIBUTIONS = ("gaussian", "uniform")


class DepthCurve(NamedTuple):
    """Two half Gaussians that meet in a peak of height 1, over the depth of a network: from 0 to 1.

    docs/methods/other-caches.md, 4.
    """

    peak: float  # depth
    first: float  # height at depth 0
    last: float  # height at depth 1


# Where in the network of a family representations change most from step to step, as published; LLaDA's elsewhere.
_LLADA = DepthCurve(0.75, 0.03 / 0.25, 0.13 / 0.25)
_DRIFT = defaultdict(lambda: _LLADA, dream=DepthCurve(0.5, 1 / 6, 5 / 6))

# Least share of the canvas that a layer before the peak computes (min_update_ratio of the published code).
_LEAST_SHARE = 2**-5


class SPAPolicy(DLLMCachePolicy):
    """Everything every ``refresh_steps`` steps, the canvas every ``refresh_gen_steps``; in between a share of it.

    The share has its peak, ``max_update_ratio``, at the depth where the model family's representations drift most.
    """

    name = "spa"
    options: ClassVar = {
        "refresh_steps": Number(int, 1, note="steps", default=50),
        "refresh_gen_steps": Number(int, 1, note="steps", default=7),
        "n_warmup_steps": Number(int, 0, note="steps", default=0),
        "max_update_ratio": Number(float, 0, 1, open_low=True, note="share of the canvas", default=0.25),
        "update_ratio_dist": Choice(DISTRIBUTIONS, default=GAUSSIAN),
        "proxy_rank": Number(int, 1, MOST_DIRECTIONS, note="directions", default=128),
    }
    defaults: ClassVar = {"window": 8, "sigma": 0.0}
    uses = (StoresOutputs(proxies=True),)

    def _due(self, view: CanvasView, step: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        everything = (step % self.option("refresh_steps", view) == 0) | (step <= self.option("n_warmup_steps", view))
        return everything, everything | (step % self.option("refresh_gen_steps", view) == 0)

    def _compares(self, view: CanvasView) -> torch.Tensor:
        return torch.ones_like(view.slots, dtype=torch.bool)

    def _count(self, view: CanvasView) -> torch.Tensor:
        largest = self.option("max_update_ratio", view).unsqueeze(1)
        curve = _DRIFT[self.traits.family]
        depth = torch.arange(1, self.traits.num_layers, dtype=torch.float64, device=largest.device)
        depth = depth / self.traits.num_layers
        before = depth < curve.peak
        # A half Gaussian that is 1 at the peak and ``edge`` at the end of the depth is edge^(x^2), x being the distance
        # from the peak in units of that half.
        far = torch.where(before, 1 - depth / curve.peak, (depth - curve.peak) / (1 - curve.peak))
        edge = torch.full_like(depth, curve.last).masked_fill(before, curve.first)
        share = largest * edge ** far.square()
        share = torch.where(before, share.clamp(min=_LEAST_SHARE), share)
        uniform = (self.option("update_ratio_dist", view) == DISTRIBUTIONS.index(UNIFORM)).unsqueeze(1)
        share = torch.where(uniform, largest, share)
        return (share * view.canvas_len.unsqueeze(1)).floor().long()

    def _proxy_rank(self, view: CanvasView) -> torch.Tensor:
        return self.option("proxy_rank", view)
