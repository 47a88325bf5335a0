"""The texts of a step as tensors, and the maps between canvas slots and positions.

Shapes: R rows (requests in this step), T positions, G canvas slots.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch

from vllm_d2cache.canvas.lines import Lines
from vllm_d2cache.ops.canvas_columns import to_positions, to_slots
from vllm_d2cache.ops.density import certainty_density
from vllm_d2cache.ops.texts import FLOATS, INTEGERS, Texts
from vllm_d2cache.options.request import SWITCHES


class OptionColumns(NamedTuple):
    """Per-request numbers of the rows in this step, each [R]; options.request has their meaning.

    Tables have these columns in this order (ops.texts.OPTIONS).
    """

    window: torch.Tensor  # int64, already resolved to a length in 1..G
    tokens_per_step: torch.Tensor  # int64
    threshold: torch.Tensor  # float32, 0 = off
    factor: torch.Tensor  # float32, 0 = off
    score: torch.Tensor  # int64, index into options.request.SCORES
    sigma: torch.Tensor  # float32
    steps: torch.Tensor  # int64, 0 = tokens_per_step decides
    longest_run: torch.Tensor  # int64, most tokens that a step commits from left to right; 0 = in any order


@dataclass(frozen=True)
class CanvasView(Lines):
    """The texts of the rows in this step. Columns past a row's own T or G are padding and False."""

    slots: torch.Tensor  # [R] int64, row -> slot
    texts: Texts
    num_positions: int  # T, the widest of the batch
    # Options that are off at 0 and that some request of the step has turned on. For the others nothing has to be
    # computed, and the host knows it.
    used: frozenset[str] = frozenset(SWITCHES)
    one_window: bool = False  # the window of each of these texts is its whole canvas
    one_commit: bool = False  # each of these requests asks for a single commit a step, but for what its rule adds

    @property
    def masked(self) -> torch.Tensor:
        """[R, G] bool: canvas slots that still hold the mask."""
        return self.texts.masked

    @property
    def live(self) -> torch.Tensor:
        """[R, G] bool: canvas slots before the first committed stop token."""
        return self.texts.live

    @cached_property
    def prompt_len(self) -> torch.Tensor:
        """[R] int64."""
        return self.texts.integers[0]

    @cached_property
    def canvas_len(self) -> torch.Tensor:
        """[R] int64."""
        return self.texts.integers[1]

    @cached_property
    def window_start(self) -> torch.Tensor:
        """[R] int64: first slot of the current window; below 0 where the window begins in the prompt."""
        return self.texts.integers[2]

    @cached_property
    def step(self) -> torch.Tensor:
        """[R] int64: number of the step that is under way or, in a plan, of the next; from 0."""
        return self.texts.integers[3]

    @cached_property
    def window_step(self) -> torch.Tensor:
        """[R] int64: the same within the current window."""
        return self.texts.integers[4]

    @cached_property
    def options(self) -> OptionColumns:
        """What the requests ask for."""
        columns = dict(zip(INTEGERS + FLOATS, (*self.texts.integers, *self.texts.floats), strict=True))
        return OptionColumns(**{name: columns[name] for name in OptionColumns._fields})

    @property
    def rules(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """[R] float32 each: threshold and factor; None where no request has turned it on."""
        threshold = self.options.threshold if "threshold" in self.used else None
        return threshold, self.options.factor if "factor" in self.used else None

    def after(self, texts: Texts) -> CanvasView:
        """The same requests behind a step; what no step changes is not derived again."""
        view = CanvasView(self.slots, texts, self.num_positions, self.used, self.one_window, self.one_commit)
        view.__dict__.update((name, value) for name, value in self.__dict__.items() if name in _LASTING)
        return view

    def select(self, rows: torch.Tensor) -> CanvasView:
        """The same of some requests only: [m] int64 lines."""
        integers, floats, masked, live = self.texts
        texts = Texts(integers[:, rows], floats[:, rows], masked[rows], live[rows])
        return replace(self, slots=self.slots[rows], texts=texts)

    @cached_property
    def length(self) -> torch.Tensor:
        """[R] int64: positions of the row's own text."""
        return self.prompt_len + self.canvas_len

    @cached_property
    def slot_index(self) -> torch.Tensor:
        """[1, G] int64."""
        return torch.arange(self.masked.shape[1], device=self.masked.device).unsqueeze(0)

    @cached_property
    def position(self) -> torch.Tensor:
        """[1, T] int64."""
        return torch.arange(self.num_positions, device=self.masked.device).unsqueeze(0)

    @cached_property
    def in_canvas(self) -> torch.Tensor:
        """[R, G] bool: the column is one of the row's own slots."""
        return self.slot_index < self.canvas_len.unsqueeze(1)

    @cached_property
    def in_text(self) -> torch.Tensor:
        """[R, T] bool: the column is one of the row's own positions."""
        return self.position < self.length.unsqueeze(1)

    @cached_property
    def in_window(self) -> torch.Tensor:
        """[R, G] bool: the slot lies in the current window."""
        start = self.window_start.unsqueeze(1)
        inside = (self.slot_index >= start) & (self.slot_index < start + self.options.window.unsqueeze(1))
        return inside & self.in_canvas

    @cached_property
    def open(self) -> torch.Tensor:
        """[R, G] bool: masks that may still become tokens."""
        return self.masked & self.live

    @cached_property
    def prior(self) -> torch.Tensor:
        """[R, G] float32: certainty density of the width that each request commits with (``options.sigma``).

        The text behind a step is the one that the next step finds: whoever plans that step may have asked already.
        """
        return certainty_density(self.masked, self.canvas_len, self.options.sigma, masks=True)

    @property
    def lead(self) -> torch.Tensor:
        """[R] int64: the leftmost mask that may still become a token; 0 where there is none."""
        return self.open.to(torch.int8).argmax(1)


# What no step changes.
_LASTING = frozenset(
    {"prompt_len", "canvas_len", "options", "length", "slot_index", "position", "in_canvas", "in_text"}
)


def canvas_to_positions(mask: torch.Tensor, view: CanvasView, shift: int = 0) -> torch.Tensor:
    """[R, G] bool (or numbers) over canvas slots as [R, T] over positions, moved left by ``shift``; elsewhere 0."""
    return to_positions(mask, _first(view, shift), view.canvas_len, view.num_positions)


def positions_to_canvas(mask: torch.Tensor, view: CanvasView, shift: int = 0) -> torch.Tensor:
    """[R, T] bool over positions as [R, G] bool over the canvas slots that read them."""
    return to_slots(mask, _first(view, shift), view.canvas_len, view.masked.shape[1])


def _first(view: CanvasView, shift: int) -> torch.Tensor:
    return view.prompt_len - shift if shift else view.prompt_len
