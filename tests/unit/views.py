"""Canvas views and option columns made by hand."""

from __future__ import annotations

from dataclasses import replace

import torch

from vllm_d2cache.canvas.view import CanvasView, OptionColumns
from vllm_d2cache.mechanisms.importance import Importance
from vllm_d2cache.ops.texts import Texts, first_window, live_slots
from vllm_d2cache.policies.base import StepOutcome

_DEFAULTS: dict[str, float] = {
    "window": 1000,
    "tokens_per_step": 1,
    "threshold": 0,
    "factor": 0,
    "score": 0,
    "sigma": 0,
    "steps": 0,
    "longest_run": 0,
}
_INTEGERS = ("window", "tokens_per_step", "score", "steps", "longest_run")


def columns(n: int, **options: float | list[float]) -> OptionColumns:
    """Options of ``n`` rows: one value for all of them, or a list."""
    assert set(options) <= set(_DEFAULTS)
    values = {}
    for name, default in _DEFAULTS.items():
        given = options.get(name, default)
        column = torch.tensor(given if isinstance(given, list) else [given] * n, dtype=torch.float32)
        values[name] = column.long() if name in _INTEGERS else column
    return OptionColumns(**values)


def view_of(
    masked: list[str], prompt_len: list[int], stops: dict[int, list[int]] | None = None, **options: float | list[float]
) -> CanvasView:
    """A view of canvases drawn as text, ``#`` masked and ``.`` known; ``stops`` lists stop tokens by row."""
    n, width = len(masked), max(map(len, masked))
    flags = torch.zeros(n, width, dtype=torch.bool)
    terminal = torch.zeros(n, width, dtype=torch.bool)
    for r, text in enumerate(masked):
        flags[r, : len(text)] = torch.tensor([c == "#" for c in text])
        terminal[r, (stops or {}).get(r, [])] = True
    lengths = [len(text) for text in masked]
    total = max(p + g for p, g in zip(prompt_len, lengths, strict=True))
    window = options.pop("window", [float(g) for g in lengths])
    made = columns(n, window=window, **options)
    live, none = live_slots(terminal), torch.zeros(n, dtype=torch.int64)
    start = first_window(flags, live, made.window)
    of_options = [made.window, made.tokens_per_step, made.score, made.steps, made.longest_run]
    integers = torch.stack([torch.tensor(prompt_len), torch.tensor(lengths), start, none, none, *of_options])
    floats = torch.stack([made.threshold, made.factor, made.sigma])
    return CanvasView(torch.arange(n), Texts(integers, floats, flags, live), total)


def at_window_step(view: CanvasView, steps: list[int]) -> CanvasView:
    """The same view after so many steps in its rows' windows."""
    integers = view.texts.integers.clone()
    integers[4] = torch.tensor(steps)
    return replace(view, texts=view.texts._replace(integers=integers))


def outcome_of(
    view: CanvasView,
    score: list[list[float]] | None = None,
    importance: list[list[float]] | None = None,
    committed: list[list[int]] | None = None,
    window_start: list[int] | None = None,
    first: bool = True,
) -> StepOutcome:
    """What a step is said to have found: everything predicted, uniform where nothing is given."""
    n, width = view.masked.shape
    flags = torch.zeros(n, width, dtype=torch.bool)
    for r, slots in enumerate(committed or []):
        flags[r, slots] = True
    return StepOutcome(
        flags,
        view.masked | flags,
        torch.ones(n, width) if score is None else torch.tensor(score),
        view.window_start if window_start is None else torch.tensor(window_start),
        torch.full((n,), first),
        found=(Importance(torch.ones(n, view.num_positions) if importance is None else torch.tensor(importance)),),
    )
