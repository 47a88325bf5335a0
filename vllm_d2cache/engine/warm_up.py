"""Synthetic steps before any request is served, so that no user's request compiles a kernel.

A kernel is compiled once for each specialisation: what requests ask for (draws, filters, thresholds), the form of a
step, whether it is cut for the card, and how the lines of a batch lie in memory, which goes by the number of its
requests modulo four. Requests of every policy and decoder that run over plain layers are denoised for a step or two;
those with mechanisms of their own add no kernel but attention to a part of the keys.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np
import torch

from vllm_d2cache.canvas.request import Request
from vllm_d2cache.decoders.registry import DECODER_CLASSES
from vllm_d2cache.graphs.step_graphs import Forward
from vllm_d2cache.mechanisms.base import Finding, Hook, Worker
from vllm_d2cache.mechanisms.importance import (
    Importance,
    ImportanceCapture,
    ImportanceHook,
    MapPool,
    ReadsImportance,
)
from vllm_d2cache.ops import split
from vllm_d2cache.ops.dispatch import chosen
from vllm_d2cache.ops.row_stats import RowParams, tile_stats
from vllm_d2cache.ops.step_rows import choose_rows
from vllm_d2cache.options.request import SCORES
from vllm_d2cache.options.sampling import SamplingSpec
from vllm_d2cache.options.server import ServerOptions
from vllm_d2cache.options.types import OptionError
from vllm_d2cache.policies.budget import row_budget
from vllm_d2cache.policies.registry import POLICY_CLASSES
from vllm_d2cache.requests.resolve import resolve
from vllm_d2cache.step.decoding import LMHead
from vllm_d2cache.step.pages import Pages
from vllm_d2cache.step.runner import Step, StepRunner

# Text and canvas of a synthetic request, where the server takes that much: more keys than a stretch, and few enough
# rows behind the first step that maps are kept.
_LENGTH, _CANVAS = 320, 24
# One that says nothing of its own: requests here say all.
_SERVER = ServerOptions({})
_GREEDY, _SAMPLED = SamplingSpec(), SamplingSpec(temperature=0.7, top_p=0.9, top_k=5, seed=0)


@dataclass(frozen=True)
class Place:
    """Where synthetic steps run."""

    worker: Worker
    forward: Forward
    lm_head: LMHead
    hidden: torch.Tensor  # [0, d], of the type of final hidden states
    blocks: int  # KV blocks, the first being nobody's; the others are overwritten
    block_size: int
    table_width: int  # block ids of a request in the engine's table
    rows: int  # most rows of a forward pass

    @property
    def text(self) -> tuple[int, int]:
        """Prompt and canvas of a synthetic request."""
        length = min(_LENGTH, self.worker.max_len)
        canvas = min(_CANVAS, length // 2)
        return length - canvas, canvas


def warm_up(place: Place, sizes: Sequence[int] = (1, 2, 3, 4)) -> int:
    """Run what requests can ask of kernels; nothing on a device without any. Overwrites KV blocks.

    Args:
        sizes: requests of a batch.

    Returns:
        how many steps were run.
    """
    if chosen(place.worker.device) == "torch":
        return 0
    _statistics(place)
    steps, most = 0, max(1, min(max(sizes), place.rows // sum(place.text)))
    for cut in (True, False):
        with split.forced(cut):
            for size in sorted({1, most}):
                steps += _Batch(place, [{}], _GREEDY, size).run(layers=True)
    for kind, sampling in _kinds():
        for size in sizes:
            # As many as to have all of the kind, and lines that lie alike.
            many = size if size >= len(kind) else size + 4
            steps += _Batch(place, kind, sampling, many).run(layers=False)
    return steps


def _kinds() -> list[tuple[list[dict[str, Any]], SamplingSpec]]:
    """What requests of a batch can ask for, in turn, as far as kernels see it."""
    threshold, factor = {"threshold": 0.9}, {"factor": 1.0}
    kinds: list[list[dict[str, Any]]] = [[{}], [threshold], [factor], [threshold, factor]]
    kinds += [[{"score": score}] for score in SCORES[1:]]
    kinds += [[{"decoder": name, "policy": "full"}] for name in _plain_decoders()]
    plain = [name for name, cls in POLICY_CLASSES.items() if all(isinstance(u, ReadsImportance) for u in cls.uses)]
    kinds += [[{"policy": name}] for name in plain]
    return [([{}], _SAMPLED), *((kind, _GREEDY) for kind in kinds)]


def _plain_decoders() -> Iterator[str]:
    """Those that use no mechanism, and nothing that an operator has to give."""
    for name, cls in DECODER_CLASSES.items():
        with suppress(OptionError):
            resolve(_SERVER, {"decoder": name, "policy": "full"})
            if not cls.uses:
                yield name


def _statistics(place: Place) -> None:
    """Of a row of logits, in every combination of what is asked about it."""
    device = place.worker.device
    logits = place.lm_head(place.hidden.new_zeros(1, place.hidden.shape[1]))
    one, k = torch.ones(1, device=device), torch.full((1,), 5, device=device)
    mask = place.worker.traits.mask_token_id
    for samples, filters, margin, entropy, scaled in product((False, True), repeat=5):
        draw = one.double() / 2 if samples else None
        params = RowParams(one, one * 0.9, k, draw, samples, filters)
        tile_stats(logits.float() if scaled else logits, params, mask, margin, entropy, scaled)


class _Told(Hook):
    """In place of a hook that looks into layers which do not run."""

    def __init__(self, finding: Finding) -> None:
        self.finding = finding

    def result(self, num_positions: int) -> Finding:
        return self.finding


class _Batch:
    """Requests of one kind, with slots and texts of their own.

    Args:
        kind: what they ask for, in turn.
    """

    def __init__(self, place: Place, kind: list[dict[str, Any]], sampling: SamplingSpec, size: int) -> None:
        prompt, canvas = place.text
        worker = replace(place.worker, num_slots=size)
        few = {"policy": "d2cache", "current_k": max(1, (prompt + canvas) // 20)}
        self.place, self.size = place, size
        self.runner = StepRunner(worker, may_graph=False)
        self.slots, self.host = torch.arange(size, device=worker.device), list(range(size))
        for slot in self.host:
            asked = kind[slot % len(kind)]
            options = resolve(_SERVER, asked if "policy" in asked else {**few, **asked})
            rows = row_budget(options, prompt, canvas, None)
            request = Request(f"warm-{slot}", prompt, canvas, options, sampling, rows)
            self.runner.add(slot, request, np.zeros(prompt, dtype=np.int64))
        blocks = -(-sum(place.text) // place.block_size)
        table = torch.zeros(size, place.table_width, dtype=torch.int32)
        table[:, :blocks] = 1 + torch.arange(size * blocks).view(size, blocks) % max(1, place.blocks - 1)
        self.table = table.to(worker.device)

    def run(self, layers: bool) -> int:
        """A first step, one with exact rows, and a padded one where these requests have any; how many there were.

        Args:
            layers: run the network; else its importance and hidden states are made up.
        """
        self._step(False, layers)
        self._step(False, layers)
        if not self.runner.forms.can_pad(self.host):
            return 2
        self._step(True, layers)
        return 3

    def _step(self, padded: bool, layers: bool) -> None:
        step = self.runner.open(self.slots, self.host, padded)
        self.runner.place(step, Pages(self.table, self.place.block_size))
        rows, device = step.rows, self.slots.device
        if layers:
            hidden = self._through_layers(step)[rows.logits_rows]
        else:
            hidden = self.place.hidden.new_zeros(rows.logits_rows.shape[0], self.place.hidden.shape[1])
            even = torch.ones(self.size, rows.view.num_positions, device=device)
            step.hooks = tuple(_Told(Importance(even)) if isinstance(h, ImportanceHook) else h for h in step.hooks)
        self.runner.close(step, hidden, self.place.lm_head)
        self._of_decoders()

    def _of_decoders(self) -> None:
        """What decoders have done to texts that take tokens back, follow a grammar or watch all masks."""
        canvas, view = self.runner.canvas, self.runner.canvas.view(self.slots, self.host)
        integers, _, masked, live = view.texts
        nothing = torch.zeros_like(masked)
        plans, shift = (canvas.refresh, canvas.observe, canvas.eligible), canvas.traits.logit_shift
        for watched, ordered in product((None, nothing.any(1)), (False, True)):
            choose_rows(self.slots, *plans, integers, masked, live, watched, ordered, shift, view.num_positions)
        tokens = torch.zeros(masked.shape, dtype=torch.int32, device=masked.device)
        after, _ = canvas.commit(view, nothing, tokens, nothing)
        canvas.emit(after, nothing.any(1))

    def _through_layers(self, step: Step) -> torch.Tensor:
        """[N, d] hidden states; before them those of rows that attend to a part of the keys."""
        rows, layout = step.rows, step.layout
        assert layout is not None
        (hook,) = step.hooks
        assert isinstance(hook, ImportanceHook)
        part = replace(layout, keys=[torch.arange(3, device=self.slots.device)] * self.size)
        nobody = ImportanceCapture(part, [False] * self.size, rows.positions, MapPool())
        self.place.forward(rows.input_ids, rows.positions, part, nobody)
        return self.place.forward(rows.input_ids, rows.positions, layout, hook.capture)
