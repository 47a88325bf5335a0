"""Requests denoised by a small random network of real ops, without an engine."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from vllm_d2cache.canvas.request import Request
from vllm_d2cache.canvas.rows import StepResult
from vllm_d2cache.canvas.traits import FamilyTraits
from vllm_d2cache.graphs.step_graphs import StepGraphs
from vllm_d2cache.mechanisms.base import Worker
from vllm_d2cache.mechanisms.importance import ImportanceCapture, ImportanceHook, MapPool
from vllm_d2cache.ops.paged_attention import PagedLayout, paged_attention, write_kv
from vllm_d2cache.options.sampling import SamplingSpec
from vllm_d2cache.options.server import ServerOptions
from vllm_d2cache.policies.budget import row_budget
from vllm_d2cache.requests.resolve import resolve
from vllm_d2cache.step.pages import Pages
from vllm_d2cache.step.runner import StepRunner

VOCAB, MASK, HEADS, HEAD, PAGE, LAYERS = 29, 5, 2, 16, 16, 2
TEXTS = [(24, 8), (40, 13)]  # prompt and canvas of each request


class Loop:
    """Attention layers between random matrices.

    Args:
        options: of each request, by plain name; a single mapping is everybody's.
        texts: prompt and canvas length of each request.
        block: positions of a block, of which texts are whole ones; None = a row sees all of its text.
    """

    def __init__(
        self,
        device: torch.device,
        options: dict[str, Any] | list[dict[str, Any]],
        sampling: SamplingSpec | None = None,
        texts: list[tuple[int, int]] = TEXTS,
        block: int | None = None,
    ) -> None:
        server = ServerOptions({}, block_length=block or 0)
        self.texts, self.device = texts, device
        longest = max(p + g for p, g in texts)
        self.steps = StepRunner(Worker(len(texts), longest, device, FamilyTraits(MASK, block_length=block), server))
        blocks = -(-longest // PAGE)
        self.table = 1 + torch.arange(len(texts) * blocks, dtype=torch.int32, device=device).view(len(texts), -1)
        shape = (1 + self.table.numel(), HEADS, PAGE, 2 * HEAD)
        self.caches = [torch.zeros(shape, device=device) for _ in range(LAYERS)]
        generator = torch.Generator().manual_seed(0)
        self.embedding = torch.randn(VOCAB, HEADS, HEAD, generator=generator).to(device)
        self.place = torch.randn(longest, HEADS, HEAD, generator=generator).to(device)
        self.head = torch.randn(HEADS * HEAD, VOCAB, generator=generator).to(device)
        self.graph_steps = 0
        for slot, (p, g) in enumerate(texts):
            chosen = resolve(server, options[slot] if isinstance(options, list) else options)
            rows = row_budget(chosen, p, g, None)
            prompt = np.random.default_rng(slot).integers(6, VOCAB, p)
            request = Request(f"r{slot}", p, g, chosen, sampling or SamplingSpec(), rows)
            self.steps.add(slot, request, prompt)

    @property
    def graphs(self) -> StepGraphs | None:
        return self.steps.forms.graphs

    @graphs.setter
    def graphs(self, graphs: StepGraphs) -> None:
        self.steps.forms.graphs = graphs

    def forward(
        self, input_ids: torch.Tensor, positions: torch.Tensor, layout: PagedLayout, capture: ImportanceCapture
    ) -> torch.Tensor:
        """[N, d] final hidden states (step_graphs.Forward)."""
        hidden = self.embedding[input_ids.long()] + self.place[positions]
        for cache in self.caches:
            write_kv(cache, hidden, hidden.flip(2), layout.slots)
            output = torch.empty_like(hidden)
            paged_attention(hidden, cache, layout, 0.2, output, capture.start_layer(hidden, cache, 0.2))
            hidden = 0.7 * (hidden + output)
        return hidden.flatten(1)

    def step(self, padded: bool = True, slots: list[int] | None = None) -> StepResult:
        """What an engine does in a step, from the plans of the last one to those of the next."""
        host = list(range(len(self.texts))) if slots is None else slots
        index = torch.arange(len(self.texts), device=self.device)
        if slots is not None:
            index = torch.tensor(slots, device=self.device)
        steps = self.steps
        assert not padded or steps.forms.can_pad(host)
        step = steps.open(index, host, padded)
        rows = step.rows
        steps.place(step, Pages(self.table[rows.view.slots], PAGE))
        if step.graph is not None:
            self.graph_steps += 1
            hidden = step.graph.replay()
        else:
            assert step.layout is not None
            (hook,) = step.hooks or (None,)
            capture = hook.capture if isinstance(hook, ImportanceHook) else nobody(step.layout)
            hidden = self.forward(rows.input_ids, rows.positions, step.layout, capture)
        return steps.close(step, hidden[rows.logits_rows], lambda x: x @ self.head).result


def nobody(layout: PagedLayout) -> ImportanceCapture:
    """A capture of a step whose requests do not read importance."""
    wanted = [False] * len(layout.counts)
    return ImportanceCapture(layout, wanted, layout.slots.new_zeros(layout.slots.shape), MapPool())
