"""Synthetic steps before any request is served, so that no user's request waits for a compiler.

Triton compiles a kernel once for each set of its constants and types: what requests ask for (draws, filters, decoders,
keys left out) and the form of a step. Numbers of requests, rows and positions make no difference
(ops/triton/common.py: kernel). So a few requests of every policy and every decoder are denoised for some steps, by the
path that real ones take, and what can only come about by mixing them is asked of the ops themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np
import torch

from vllm_d2cache.canvas.request import Request
from vllm_d2cache.decoders.registry import DECODER_CLASSES
from vllm_d2cache.mechanisms.base import Worker
from vllm_d2cache.ops import split
from vllm_d2cache.ops.dispatch import chosen
from vllm_d2cache.ops.row_filter import filter_logits
from vllm_d2cache.ops.row_stats import RowParams, tile_stats
from vllm_d2cache.ops.step_rows import choose_rows
from vllm_d2cache.options.request import SCORES, RequestOptions
from vllm_d2cache.options.sampling import EditSpec, SamplingSpec
from vllm_d2cache.options.types import OptionError
from vllm_d2cache.policies.budget import row_budget
from vllm_d2cache.policies.registry import POLICY_CLASSES
from vllm_d2cache.requests.resolve import resolve
from vllm_d2cache.step.decoding import LMHead
from vllm_d2cache.step.pages import Pages
from vllm_d2cache.step.runner import StepRunner
from vllm_d2cache.step.step import Step

# Text and canvas of a synthetic request, where the server takes that much: so few rows behind the first step that its
# maps are kept.
_LENGTH, _CANVAS = 320, 24
# By then all methods have done what they do: some leave keys out from the third step on.
_STEPS = 4
_GREEDY = SamplingSpec()
_SAMPLINGS = (SamplingSpec(0.7), SamplingSpec(0.7, 0.9, 5), SamplingSpec(edits=EditSpec(banned=(0,))))


@dataclass(frozen=True)
class Place:
    """Where synthetic steps run."""

    worker: Worker
    layers: Callable[[Step], torch.Tensor]  # the network on a placed step: [N, d] final hidden states
    lm_head: LMHead
    blocks: int  # KV blocks, the first being nobody's; the others are overwritten
    block_size: int
    rows: int  # most rows of a forward pass


def warm_up(place: Place) -> int:
    """Run what requests can ask of kernels; nothing on a device without any. Overwrites KV blocks.

    Returns:
        how many steps were run.
    """
    if chosen(place.worker.device) == "torch":
        return 0
    steps = 0
    for cut, (kind, sampling) in product((True, False), list(_kinds(place.worker))):
        batch = _Batch(place, kind, sampling)
        with split.forced(cut):
            hidden = batch.run()
        steps += batch.steps
    _mixtures(batch, place.lm_head, hidden[:1])
    return steps


def _kinds(worker: Worker) -> Iterator[tuple[list[RequestOptions], SamplingSpec]]:
    """What the requests of a batch ask for, in turn: what goes together on this server."""
    server = replace(worker.server, request_defaults={})  # a request can name other values
    threshold, factor = {"threshold": 0.9}, {"factor": 1.0}
    asked: list[list[dict[str, Any]]] = [[threshold], [factor], [threshold, factor], [{"confidence_top_p": 0.9}]]
    asked += [[{"score": score}] for score in SCORES] + [[{"decoder": name}] for name in DECODER_CLASSES]
    kinds = [([[{"policy": policy}]], _GREEDY) for policy in POLICY_CLASSES]
    # The first policy that it goes with.
    kinds += [([[{"policy": p, **one} for one in kind] for p in POLICY_CLASSES], _GREEDY) for kind in asked]
    kinds += [([[{"policy": policy}] for policy in POLICY_CLASSES], sampling) for sampling in _SAMPLINGS]
    for alternatives, sampling in kinds:
        for kind in alternatives:
            with suppress(OptionError):
                yield [resolve(server, one) for one in kind], sampling
                break


class _Batch:
    """Requests of one kind, with slots and texts of their own.

    Args:
        kind: options of the requests, in turn.
    """

    def __init__(self, place: Place, kind: list[RequestOptions], sampling: SamplingSpec) -> None:
        worker, device = place.worker, place.worker.device
        length = min(_LENGTH, worker.max_len - 1)  # room for rows behind it
        canvas = min(_CANVAS, length // 2)
        size = max(1, min(2, place.rows // length, worker.num_slots))
        self.place, self.host, self.slots = place, list(range(size)), torch.arange(size, device=device)
        self.steps = 0
        self.runner = StepRunner(replace(worker, num_slots=size), may_graph=False)
        for slot in self.host:
            options = kind[slot % len(kind)]
            rows = row_budget(options, length - canvas, canvas, worker.server.refresh_budget)
            request = Request(f"warm-{slot}", length - canvas, canvas, options, sampling, rows)
            self.runner.add(slot, request, np.zeros(length - canvas, dtype=np.int64))
        width = -(-worker.max_len // place.block_size)
        table = 1 + torch.arange(size * width).view(size, width) % max(1, place.blocks - 1)
        self.table = table.to(device, torch.int32)

    def run(self) -> torch.Tensor:
        """A first step, some with exact rows, and a padded one where these requests have any; [N, d] of the last."""
        for _ in range(_STEPS):
            hidden = self._step(False)
        return self._step(True) if self.runner.forms.can_pad(self.host) else hidden

    def _step(self, padded: bool) -> torch.Tensor:
        step = self.runner.open(self.slots, self.host, padded)
        self.runner.place(step, Pages(self.table, self.place.block_size))
        hidden = self.place.layers(step)
        assert step.rows is not None
        self.runner.close(step, hidden[step.rows.logits_rows], self.place.lm_head)
        self.steps += 1
        return hidden


def _mixtures(batch: _Batch, lm_head: LMHead, hidden: torch.Tensor) -> None:
    """What follows from what several requests of a step ask for, in every combination."""
    canvas, view = batch.runner.canvas, batch.runner.canvas.view(batch.slots, batch.host)
    integers, _, masked, live = view.texts
    plans, shift = (canvas.refresh, canvas.observe, canvas.eligible), canvas.traits.logit_shift
    nothing = torch.zeros_like(masked)
    some = (None, nothing.any(1))
    for watched, again, ordered in product(some, some, (False, True)):
        choose_rows(view.slots, *plans, integers, masked, live, watched, again, ordered, shift, view.num_positions)
    tokens = torch.zeros(masked.shape, dtype=torch.int32, device=masked.device)
    for revoked, (revised, held) in product((None, nothing), ((None, None), (nothing, nothing.any(1)))):
        after, _ = canvas.commit(view, nothing, tokens, revoked, revised, held)
        canvas.emit(after, nothing.any(1), held)
    logits, mask, one = lm_head(hidden), canvas.traits.mask_token_id, torch.ones(len(hidden), device=hidden.device)
    k, draw = torch.full_like(one, 5, dtype=torch.int64), one.double() / 2
    for samples, filters, margin, entropy in product((False, True), repeat=4):
        params = RowParams(one, one * 0.9, k, draw if samples else None, samples, filters)
        tile_stats(logits, params, mask, margin, entropy)
        tile_stats(logits.float(), params, mask, margin, entropy, True)
    filter_logits(logits.float(), one, k, mask)
