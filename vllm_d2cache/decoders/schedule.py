"""How many tokens a step commits at least: a fixed count, or what a number of steps works out to."""

from __future__ import annotations

import torch

from vllm_d2cache.canvas.view import CanvasView

# The released Dream code ends its timesteps here instead of at 0.
_DREAM_EPSILON = 1e-3


def least_commits(view: CanvasView, schedule: str) -> torch.Tensor:
    """Tokens to commit at least, before it is asked how many candidates there are.

    Args:
        view: before this step's commits.
        schedule: of the model family, for requests that give ``steps`` (canvas.traits).

    Returns:
        [R] int64, at least 1.
    """
    steps, fixed = view.options.steps, view.options.tokens_per_step
    num_windows = -(-view.canvas_len // view.options.window)
    per_window = steps // num_windows
    left = (per_window - view.window_step).clamp(min=1)
    # Masks behind a stop token count as well: they keep the pace of the others.
    masked = (view.masked & view.in_window).sum(1)
    count = -(-masked // left) if schedule == "even" else _by_timestep(masked, per_window, view.window_step, left)
    return torch.where(steps > 0, count.clamp(min=1), fixed)


def _by_timestep(
    masked: torch.Tensor, per_window: torch.Tensor, window_step: torch.Tensor, left: torch.Tensor
) -> torch.Tensor:
    """[R] int64: the share of the masks that the step from time t to s takes, 1 - s / t; the last step takes all."""
    drop = (1 - _DREAM_EPSILON) / per_window.clamp(min=1).double()
    share = drop / (1 - window_step.clamp(max=per_window) * drop)
    return torch.where(left <= 1, masked, (masked * share).long())
