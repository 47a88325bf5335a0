"""The optimiser of the tiny checkpoints."""

from __future__ import annotations

import collections

import torch
from torch import Tensor

from tiny_model import TinyLM


class Muon:
    """Momentum with orthogonalised updates for the blocks' matrices, AdamW for everything else."""

    def __init__(self, model: TinyLM, lr: float, decay: float) -> None:
        named = list(model.named_parameters())
        self.matrices = [w for name, w in named if "blocks" in name and w.ndim == 2]
        rest = [w for name, w in named if not ("blocks" in name and w.ndim == 2)]
        self.adam = torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.98), weight_decay=0.0)
        self.momentum = [torch.zeros_like(w) for w in self.matrices]
        self.decay = decay

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """One update; an orthogonal update is scaled to AdamW's typical size, so one lr serves both."""
        for group in self.adam.param_groups:
            group["lr"] = lr
        self.adam.step()
        groups = collections.defaultdict(list)
        for weight, momentum in zip(self.matrices, self.momentum, strict=True):
            momentum.lerp_(weight.grad, 0.05)
            update = weight.grad.lerp(momentum, 0.95)
            groups[(min(weight.shape), max(weight.shape))].append((weight, update))
        for shape, pairs in groups.items():
            flat = torch.stack([u if u.shape[0] <= u.shape[1] else u.T for _, u in pairs])
            for (weight, _), update in zip(pairs, orthogonalise(flat), strict=True):
                update = update if weight.shape[0] <= weight.shape[1] else update.T
                weight.mul_(1 - lr * self.decay).add_(update, alpha=-lr * 0.2 * shape[1] ** 0.5)


def orthogonalise(x: Tensor, steps: int = 5) -> Tensor:
    """Newton-Schulz iteration (Muon's quintic) on a stack of matrices (n, a, b) with a <= b, in bfloat16."""
    x = (x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)).bfloat16()
    for _ in range(steps):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.float()
